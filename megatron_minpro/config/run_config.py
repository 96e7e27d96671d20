"""RunConfig: everything one run is, and the rules that tie its sections together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from megatron_minpro.config.sections import (
    ActorConfig,
    AdvantagesConfig,
    CheckpointConfig,
    CorrectionsConfig,
    DebugConfig,
    EnvironmentConfig,
    EvaluationConfig,
    LocalPath,
    MayChange,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    ProfileConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TrackingConfig,
)
from megatron_minpro.config.settings import Origins
from parallel.layout import ParallelLayout


class RunConfig(Section):
    """What is optimised, of which model, on which prompts, sampled how, trained where. Paths are relative to the working directory."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run; its folder is output_dir/name")
    seed: int = Field(ge=0, description="of prompt order, sampling and dropout")
    output_dir: MayChange[LocalPath] = Field(
        default="runs", min_length=1, validate_default=True, description="folder that holds the run folders"
    )
    num_global_steps: MayChange[int] = Field(ge=1, description="batches trained; may grow when a run is continued, also a finished one")
    staleness: int = Field(ge=0, description="a batch sampled at global step k is trained at step k + staleness; 0 is on-policy")
    schedule: MayChange[Literal["overlapped", "serial"] | None] = Field(
        default=None,
        description="overlapped: sample batch k while batch k - staleness is trained; serial: one after the other; the numbers are the "
        "same. null: overlapped for staleness >= 1, else serial",
    )
    behaviour_logprobs: Literal["trainer", "engine"] = Field(
        description="whose log-probabilities are pi_old; trainer: computed under the sampling weights; engine: as sampled"
    )
    objective: ObjectiveConfig = Field(description="what is optimised")
    corrections: CorrectionsConfig = Field(
        default_factory=CorrectionsConfig, description="for the difference between server and trainer log-probs; off unless given"
    )
    advantages: AdvantagesConfig = Field(description="from rewards to advantages")
    environment: EnvironmentConfig = Field(
        default_factory=EnvironmentConfig, description="what happens between a prompt and its reward; one answer of the model unless given"
    )
    reward: RewardConfig = Field(description="how a response is judged")
    model: ModelConfig = Field(description="which model is trained")
    prompts: PromptsConfig = Field(description="training prompts")
    evaluation: EvaluationConfig | None = Field(description="the held-out measurement; null: none")
    rollout: RolloutConfig = Field(description="where responses come from")
    actor: ActorConfig = Field(description="how the policy is updated")
    world_size: MayChange[int] = Field(ge=1, description="trainer ranks")
    parallel: MayChange[ParallelConfig] = Field(default_factory=ParallelConfig, description="how the model is spread over them")
    checkpoint: MayChange[CheckpointConfig] = Field(default_factory=CheckpointConfig, description="when the state is saved")
    tracking: MayChange[TrackingConfig] = Field(default_factory=TrackingConfig, description="what is written down")
    profile: MayChange[ProfileConfig] = Field(default_factory=ProfileConfig, description="which steps are traced")
    debug: DebugConfig = Field(default_factory=DebugConfig, description="checks that cost time")
    megatron: dict[str, Any] = Field(default_factory=dict, description="passed through to Megatron's TransformerConfig and OptimizerConfig")
    sglang: dict[str, Any] = Field(default_factory=dict, description="passed through to the SGLang server's arguments")

    _origins: Origins = PrivateAttr(default_factory=Origins)

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        self._check_schedule()
        self._check_layout()
        self._check_mini_batches()
        self._check_micro_batch()
        self._check_corrections()
        self._check_behaviour()
        self._check_score_centering()
        self._check_overlong()
        self._check_steps()
        return self

    def _check_schedule(self) -> None:
        if self.schedule == "overlapped" and self.staleness == 0:
            raise ValueError("schedule = 'overlapped': expected staleness of at least 1, or null; on policy a batch is trained as it comes")
        if self.rollout.publish == "rolling" and self.effective_schedule == "serial":
            raise ValueError(
                f"rollout.publish = 'rolling': expected 'together' with staleness = {self.staleness} and schedule = {self.schedule!r}: the "
                "serial schedule samples one batch at a time"
            )

    def _check_layout(self) -> None:
        layout, dp = self.layout, self.parallel.dp
        if dp is not None and dp != layout.dp:
            raise ValueError(
                f"parallel.dp = {dp}: expected null or what tp, pp and cp leave of world_size = {self.world_size}, {layout.dp}"
            )

    def _check_mini_batches(self) -> None:
        prompts, updates = self.rollout.prompts_per_step, self.actor.updates_per_step
        if prompts % updates != 0:
            raise ValueError(
                f"rollout.prompts_per_step = {prompts}: expected a multiple of actor.updates_per_step = {updates}, "
                "so that every mini-batch holds whole groups"
            )
        if self.sequences_per_mini_batch < self.layout.dp:
            raise ValueError(
                f"actor.updates_per_step = {updates}: a mini-batch of {self.sequences_per_mini_batch} responses leaves some "
                f"of the {self.layout.dp} data-parallel ranks without one; expected fewer updates or a smaller world_size"
            )

    def _check_micro_batch(self) -> None:
        multiple = self.layout.sequence_multiple
        longest = self.prompts.max_prompt_tokens + self.rollout.max_new_tokens
        padded = -(-longest // multiple) * multiple
        if self.actor.max_tokens_per_micro_batch < padded:
            raise ValueError(
                f"actor.max_tokens_per_micro_batch = {self.actor.max_tokens_per_micro_batch}: expected at least {padded}, the longest "
                f"sequence, padded: prompts.max_prompt_tokens {self.prompts.max_prompt_tokens} "
                f"+ rollout.max_new_tokens {self.rollout.max_new_tokens}"
            )

    def _check_corrections(self) -> None:
        if self.corrections.active and self.behaviour_logprobs == "engine":
            raise ValueError(
                f"behaviour_logprobs = 'engine': expected 'trainer' with corrections.{self.corrections.active[0]}, which compares "
                "the server's log-probs with the trainer's; as pi_old the server's own need no correction"
            )

    def _check_behaviour(self) -> None:
        """pi_old must be the policy that sampled."""
        trainer, servers = self.model.dtype, self.rollout.dtype
        if trainer != servers and self.behaviour_logprobs == "trainer" and not self.corrections.active:
            raise ValueError(
                f"rollout.dtype = {servers!r}: expected {trainer!r}, the model.dtype: with behaviour_logprobs = 'trainer' pi_old is not "
                "the policy that sampled; or behaviour_logprobs = 'engine', or corrections.truncated_is, masked_is or rejection"
            )

    def _check_score_centering(self) -> None:
        if self.objective.score_centering is not None and self.behaviour_logprobs != "engine":
            raise ValueError(
                f"behaviour_logprobs = {self.behaviour_logprobs!r}: expected 'engine' with objective.score_centering, which needs the "
                "distribution that the servers sampled from"
            )

    def _check_overlong(self) -> None:
        overlong = self.reward.overlong
        if overlong is not None and overlong.max_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong.max_tokens = {overlong.max_tokens}: expected at most rollout.max_new_tokens = "
                f"{self.rollout.max_new_tokens}, where every response ends; the punishment would never be reached in full"
            )

    def _check_steps(self) -> None:
        if self.staleness > self.num_global_steps:
            raise ValueError(
                f"staleness = {self.staleness}: expected at most num_global_steps = {self.num_global_steps}, or no lag reaches it"
            )
        traced = self.profile.first_and_last
        if traced is not None and traced[1] >= self.num_global_steps:
            raise ValueError(
                f"profile.steps = {self.profile.steps!r}: expected steps from 0 to {self.num_global_steps - 1}, of num_global_steps = "
                f"{self.num_global_steps}"
            )

    @property
    def origins(self) -> Origins:
        """Where each setting was written; empty unless the configuration was read from a file."""
        return self._origins

    def remember(self, origins: Origins) -> None:
        """Keep where each setting was written, for errors that are found later."""
        self._origins = origins

    @property
    def effective_schedule(self) -> Literal["overlapped", "serial"]:
        """The schedule, with null resolved."""
        return self.schedule or ("overlapped" if self.staleness else "serial")

    @property
    def layout(self) -> ParallelLayout:
        """The trainer's layout; sequence parallelism is on exactly when tp > 1 unless the config says otherwise."""
        parallel = self.parallel
        return ParallelLayout(
            world_size=self.world_size,
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            count_embedding_as_layer=parallel.count_embedding_as_layer,
            count_loss_as_layer=parallel.count_loss_as_layer,
            layers_in_first_stage=parallel.layers_in_first_stage,
            layers_in_last_stage=parallel.layers_in_last_stage,
            layers_per_stage=parallel.layers_per_stage,
            cp=parallel.cp,
            ep=parallel.ep,
            etp=parallel.etp,
            sequence_parallel=parallel.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
        )

    @property
    def prompt_sections(self) -> dict[str, PromptsConfig]:
        """Setting -> prompts, for all that the run reads."""
        held_out = {} if self.evaluation is None else {"evaluation.prompts": self.evaluation.prompts}
        return {"prompts": self.prompts, **held_out}

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name

    @property
    def sequences_per_mini_batch(self) -> int:
        """Responses trained by one optimizer step, over all ranks."""
        return self.rollout.prompts_per_step // self.actor.updates_per_step * self.rollout.group_size
