"""The sections of a run's configuration. Frozen; an unknown key is an error; what changes the result has no default.

Keys with a default are those that cannot move a trained number (places, ports, time limits, logging) and those whose null means off.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from parallel.optimizer_settings import OptimizerSettings
from rollout.loopback import is_loopback

Dtype = Literal["float32", "bfloat16"]

T = TypeVar("T")
ON_RESUME = "may change on resume"
# A setting of this type may differ between attempts at one run: it says where and when, not what is computed. (Another layout changes the
# order of sums at most.) On a section it covers every setting of the section.
MayChange = Annotated[T, ON_RESUME]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else path  # an empty one is refused by its length


def _absolute_file(source: str) -> str:
    return _absolute(source) if Path(source).expanduser().is_file() else source


# A path is resolved once, where it is read: servers and other machines' processes have working folders of their own.
LocalPath = Annotated[str, AfterValidator(_absolute)]
# The same for a setting that may also name something else.
LocalFile = Annotated[str, AfterValidator(_absolute_file)]


class Section(BaseModel):
    """Typed, frozen, closed: a string is not a number, 1 is not a boolean, NaN is not allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Choice(Section):
    """One plug-in and its own options, written side by side: {name: minpro, clip_high: 4.0}."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """Everything beside the fields; what is left out takes the default in the plug-in's signature."""
        return dict(self.model_extra or {})


class ScoreCenteringConfig(Section):
    """Subtract what a truncated importance weight adds to the gradient in the mean (arXiv:2609.20807; objectives/score_centering.py)."""

    top_k: int = Field(
        default=128,
        ge=1,
        description="the servers' most likely tokens that are recorded for each sampled one; all others are taken as one. 128 and 32 are "
        "equal in the paper. 8 bytes each, on disk until the batch is trained: 1 KiB for a sampled token with 128",
    )


class ObjectiveConfig(Choice):
    """What is optimised. The other keys are the objective's options; see megatron_minpro/objectives."""

    name: str = Field(
        description="minpro, cispo, scaled_cispo, grpo, gspo, m2po, ctpo, topr, dppo_tv, dppo_kl, cppo, a3po, sat, estr, pnpo, vespo, "
        "sapo, ema_kpo, drpo, prefix_ratio, prefix_filter, masked_is, reinforce, or package.module:function"
    )
    score_centering: ScoreCenteringConfig | None = Field(
        default=None,
        description="null: off; {}: on. Needs behaviour_logprobs: engine, and minpro, cispo, scaled_cispo, prefix_ratio, masked_is, "
        "reinforce, or an objective of your own that can be centred",
    )

    @property
    def num_top_tokens(self) -> int:
        """How many of the servers' most likely tokens are recorded for each sampled one; 0 without score centering."""
        return 0 if self.score_centering is None else self.score_centering.top_k


class OverlongConfig(Section):
    """DAPO's soft punishment of length (arXiv:2503.14476, eq. 13)."""

    max_tokens: int = Field(ge=1, description="responses of this length get the whole punishment")
    buffer_tokens: int = Field(ge=1, description="the punishment grows linearly over this many tokens before max_tokens")
    factor: float = Field(default=1.0, gt=0, description="the whole punishment; 1 in the paper")


class RewardConfig(Choice):
    """How a response is judged. The other keys are the reward's options; see megatron_minpro/rewards."""

    name: str = Field(description="math_verify, or package.module:function")
    overlong: OverlongConfig | None = Field(default=None, description="null: length is not punished")
    concurrency: MayChange[int] = Field(default=32, ge=1, description="calls that run at once, of a reward that is a coroutine")

    @property
    def overlong_options(self) -> dict[str, Any] | None:
        """`overlong` as make_reward takes it."""
        return None if self.overlong is None else self.overlong.model_dump()


class EnvironmentConfig(Choice):
    """What happens between a prompt and its reward; see megatron_minpro/environments."""

    name: str = Field(default="single_turn", description="single_turn, or package.module:function, a coroutine of your own")


class AdvantagesConfig(Choice):
    """How rewards become advantages. The other keys are the estimator's options; see megatron_minpro/objectives/advantages.py."""

    estimator: str = Field(
        description="group_normalized: (R - mean) / (std + epsilon) over the responses to one prompt; mean_only, leave_one_out, "
        "batch_whitened, or package.module:function"
    )


class TokenizerConfig(Choice):
    """The tokenizer of a base model that is made: an existing one, or a plug-in that writes one. The other keys are its options."""

    folder: LocalPath | None = Field(default=None, description="folder with a tokenizer to take over")
    name: str | None = Field(default=None, description="package.module:function, called with the folder that it writes a tokenizer into")

    @model_validator(mode="after")
    def _is_one_of_them(self) -> TokenizerConfig:
        if (self.folder is None) == (self.name is None):
            raise ValueError(f"folder = {self.folder!r}: expected either a folder or the name of a plug-in, found name = {self.name!r}")
        if self.folder is not None and self.options:
            raise ValueError(f"{next(iter(self.options))} = {next(iter(self.options.values()))!r}: expected no option beside folder")
        return self


class ExamplesConfig(Choice):
    """Where the worked examples of supervised learning come from. The other keys are the plug-in's options."""

    name: str = Field(description="package.module:function, called with the prompts and the seed; gives (prompt, response) texts")


class WarmUpConfig(Section):
    """How to make the base model when model.path does not exist yet: supervised learning on worked examples."""

    architecture: dict[str, Any] = Field(description="fields of the Hugging Face Qwen3MoeConfig or Qwen3Config (chosen by model_type)")
    tokenizer: TokenizerConfig = Field(description="of the base model")
    examples: ExamplesConfig | None = Field(description="what it learns from; null only with num_steps 0")
    num_steps: int = Field(ge=0, description="supervised optimizer steps; 0 leaves the weights random")
    batch_size: int = Field(ge=1, description="worked examples per step")
    learning_rate: float = Field(gt=0, description="peak learning rate, reached after a short warm-up, then cosine to a twentieth of it")
    seed: int = Field(ge=0, description="of the initial weights and of the worked examples")

    @model_validator(mode="after")
    def _has_examples(self) -> WarmUpConfig:
        if self.num_steps and self.examples is None:
            raise ValueError(f"num_steps = {self.num_steps}: expected 0 without examples")
        return self


class ModelConfig(Section):
    """Which model is trained."""

    path: LocalPath = Field(min_length=1, description="folder in Hugging Face format: config.json, safetensors, tokenizer")
    dtype: Dtype = Field(description="of parameters and activations in the trainer; master weights and log-probabilities are float32")
    warm_up: WarmUpConfig | None = Field(description="how to make the folder when it does not exist; null: it must exist")


class PromptsConfig(Section):
    """Where prompts come from and how a row becomes a prompt; the keys are the arguments of megatron_minpro.data.sources.load_prompts."""

    source: LocalFile = Field(
        min_length=1,
        description="a .jsonl, .jsonl.gz, .json or .parquet file, a Hugging Face data set (owner/name), or package.module:function",
    )
    max_prompt_tokens: int = Field(ge=1, description="longer prompts (after the chat template) are dropped and counted")
    options: dict[str, Any] = Field(default_factory=dict, description="of the plug-in; split, name, revision of a Hugging Face dataset")
    preset: str | None = Field(
        default=None,
        description="layout of a well-known data set: dapo, gsm8k, amc23, aime24, aime25, math500, olympiadbench, minerva_math; the keys "
        "below override its values",
    )
    question_field: str | None = Field(default=None, description="dotted path of the question in a row (prompt.0.content)")
    answer_field: str | None = Field(default=None, description="dotted path of the answer in a row (reward_model.ground_truth)")
    answer_format: str | None = Field(default=None, description="where the answer is inside its field: plain, after_hashes or boxed")
    wrapper: str | None = Field(default=None, description="instructions around the question: dapo, boxed, or a text with {question}")


class EvaluationConfig(Section):
    """The held-out measurement of pass@1 and pass@k. `evaluation: null` switches it off."""

    prompts: PromptsConfig = Field(description="held-out prompts, same shape as the training prompts")
    num_prompts: int = Field(ge=1, description="how many prompts of the source, from its first on")
    samples_per_prompt: int = Field(ge=1, description="responses per prompt; pass@k is estimated for every power of two up to it")
    temperature: float = Field(gt=0, description="sampling temperature")
    top_p: float = Field(gt=0, le=1, description="nucleus; the paper evaluates with 0.7")
    every: int = Field(ge=0, description="global steps between evaluations during training; 0: only before and after training")


class TruncatedIsConfig(Section):
    """Importance weight of a token, cut off above."""

    max_weight: float = Field(ge=1, description="largest weight of a token; 2 is common")


class MaskedIsConfig(Section):
    """Importance weight of a token, 0 outside the bounds (IcePop)."""

    low: float = Field(ge=0, le=1, description="smallest ratio kept; 0.5 is common")
    high: float = Field(ge=1, description="largest ratio kept; 5 is common")


class RejectionConfig(Section):
    """Responses whose ratio as a whole lies outside the bounds have weight 0."""

    level: Literal["geometric_mean", "product"] = Field(description="ratio of a response: of its tokens' ratios, the mean or the product")
    low: float = Field(ge=0, le=1, description="smallest ratio kept; 0.999 is common for geometric_mean")
    high: float = Field(ge=1, description="largest ratio kept; 1.001 is common for geometric_mean")


class CorrectionsConfig(Section):
    """For the difference between server and trainer log-probs of the same weights; they compose (objectives/corrections.py)."""

    truncated_is: TruncatedIsConfig | None = Field(default=None, description="null: off")
    masked_is: MaskedIsConfig | None = Field(default=None, description="null: off")
    rejection: RejectionConfig | None = Field(default=None, description="null: off")

    @property
    def active(self) -> list[str]:
        """Names of those that are on."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


class DynamicSamplingConfig(Section):
    """Groups from which nothing can be learnt are dropped and replaced by responses to further prompts (DAPO, arXiv:2503.14476, eq. 11)."""

    equal: Literal["reward", "correct"] = Field(
        description="what makes a group useless: equal rewards, or (DAPO) all responses right or all wrong, before the length punishment"
    )
    max_rounds: int = Field(ge=2, description="times a global step may sample, the first included; then equal groups fill the batch")


class RolloutConfig(Section):
    """Where responses come from: how many, how long, how sampled, by which servers."""

    servers: MayChange[int] = Field(ge=0, description="server processes to start on this machine; 0 with endpoints")
    tp: int = Field(ge=1, description="tensor parallelism of each server")
    prompts_per_step: int = Field(ge=1, description="prompts sampled per global step")
    group_size: int = Field(ge=2, description="responses per prompt; their rewards are compared with each other")
    max_new_tokens: int = Field(ge=1, description="a response is cut here, with finish reason length")
    temperature: float = Field(gt=0, description="sampling temperature; the trainer scores at the same one")
    top_p: float = Field(description="must be 1: a truncated distribution is not the policy whose log-probabilities are trained")
    dtype: Dtype = Field(description="of the servers' weights")
    weight_sync: MayChange[str] = Field(description="how new weights travel to the servers: collective, disk, or package.module:function")
    publish: MayChange[Literal["together", "rolling"]] = Field(
        default="together",
        description="together: all servers take new weights at the same time; rolling: each one when it has finished its share of a batch, "
        "while others still sample. The numbers are the same. rolling needs two servers, schedule: overlapped, no dynamic_sampling",
    )
    assignment: MayChange[Literal["fixed", "least_outstanding"] | None] = Field(
        default=None,
        description="which server gets a prompt; fixed: in turn, so that a run repeats; least_outstanding: the one with the fewest tokens "
        "under way. null: fixed on a CPU, else least_outstanding",
    )
    requests_per_server: MayChange[int | None] = Field(
        default=None,
        ge=1,
        description="requests under way at once, per server; further ones wait and go where the least is to do. More than a server can run "
        "at once, or it idles. null: 4096 over all servers",
    )
    end_tokens: tuple[str | int, ...] = Field(
        default=(),
        strict=False,
        description="further tokens that end a response, by text or id; those that the model's own files name always do",
    )
    dynamic_sampling: DynamicSamplingConfig | None = Field(default=None, description="null: every group is trained")
    max_logprob_gap: MayChange[float | None] = Field(
        default=None,
        gt=0,
        description="largest mean difference between server and trainer log-probs of the sampled tokens, under the same weights; "
        "null: 1e-4 where both compute in float32, else 0.05",
    )
    logprob_gap_action: MayChange[Literal["stop", "warn"]] = Field(
        default="stop", description="what a larger gap does: stop the run, or warn once"
    )
    host: MayChange[str] = Field(
        default="127.0.0.1", description="address the servers bind to; any other than loopback demands the two keys"
    )
    base_port: MayChange[int | None] = Field(default=None, ge=1024, le=65535, description="first port; null: free ports are chosen")
    api_key_path: MayChange[LocalPath | None] = Field(default=None, description="one-line file with the key that every request must carry")
    admin_key_path: MayChange[LocalPath | None] = Field(default=None, description="one-line file with the key for changing weights")
    start_timeout_s: MayChange[float] = Field(
        default=300.0, gt=0, description="limit until a server is ready, and for how long a run waits while no server answers"
    )
    request_timeout_s: MayChange[float] = Field(default=600.0, gt=0, description="one generation request, retries not included")
    max_retries: MayChange[int] = Field(default=3, ge=0, description="further attempts after a failed request")
    max_server_restarts: MayChange[int] = Field(
        default=5, ge=0, description="of one dead or hung server within the window; after one more it is given up"
    )
    restart_window_s: MayChange[float] = Field(default=3600.0, gt=0, description="the window of max_server_restarts")
    unresponsive_after_s: MayChange[float] = Field(
        default=15.0, gt=0, description="a server whose HTTP process gives no answer for this long counts as hung"
    )
    progress_timeout_s: MayChange[float] = Field(
        default=120.0,
        gt=0,
        description="a server whose computing process gives no answer between two of its steps for this long counts as hung. With "
        "weight_sync: disk, which loads a whole model in one step, its bytes / weight_sync_gb_per_s are added",
    )
    control_timeout_s: MayChange[float] = Field(
        default=30.0, gt=0, description="what moves no weights: a look at a server, pause, new version, continue, leaving a process group"
    )
    weight_sync_timeout_s: MayChange[float] = Field(
        default=60.0,
        gt=0,
        description="one step of a weight update: joining the process group, one bucket (its bytes / weight_sync_gb_per_s are added), "
        "with weight_sync: disk the loading (all bytes / weight_sync_gb_per_s are added)",
    )
    weight_sync_gb_per_s: MayChange[float] = Field(
        default=0.1, gt=0, description="weights that arrive at a lower rate, in gigabytes a second, count as stuck"
    )
    endpoints: MayChange[tuple[str, ...]] = Field(default=(), strict=False, description="servers started elsewhere, http://host:port")

    @model_validator(mode="after")
    def _is_consistent(self) -> RolloutConfig:
        if self.top_p != 1.0:
            raise ValueError(f"top_p = {self.top_p}: expected 1.0, a truncated distribution is not the policy that is trained")
        self._check_endpoints()
        if bool(self.servers) == bool(self.endpoints):
            raise ValueError(f"servers = {self.servers} with {len(self.endpoints)} endpoints: expected servers >= 1 or endpoints, not both")
        self._check_rolling()
        if not is_loopback(self.host) and (self.api_key_path is None or self.admin_key_path is None):
            raise ValueError(f"host = {self.host!r}: expected api_key_path and admin_key_path beside it, others can reach this address")
        step_s = self.weight_sync_timeout_s
        if self.progress_timeout_s <= step_s:  # the trainer gives up first: the end of its group frees the servers that only wait in it
            raise ValueError(f"progress_timeout_s = {self.progress_timeout_s:g}: expected more than weight_sync_timeout_s = {step_s:g}")
        if self.base_port is not None and self.base_port + self.servers - 1 > 65535:
            raise ValueError(f"base_port = {self.base_port} leaves no room for {self.servers} ports below 65536")
        return self

    def _check_endpoints(self) -> None:
        for endpoint in self.endpoints:
            if not endpoint.startswith(("http://", "https://")):
                raise ValueError(f"endpoints holds {endpoint!r}: expected http://host:port")
        servers = Counter(endpoint.rstrip("/").lower() for endpoint in self.endpoints)
        if servers.total() > len(servers):
            raise ValueError(f"endpoints holds {servers.most_common(1)[0][0]!r} more than once: expected every server once")

    def _check_rolling(self) -> None:
        if self.publish != "rolling":
            return
        if (num_servers := self.servers + len(self.endpoints)) < 2:
            raise ValueError(f"publish = 'rolling': expected 'together' with {num_servers} server; no other one samples meanwhile")
        if self.dynamic_sampling is not None:
            raise ValueError(
                "publish = 'rolling': expected 'together' with dynamic_sampling: the next batch's prompts are known only when this one is "
                "judged"
            )


class SampleSizeConfig(Section):
    """VCPO's step size (arXiv:2602.17616): each step's rate times min(1, (ESS / B) / base) ^ exponent."""

    level: Literal["token", "prefix", "sequence"] = Field(
        description="which metric effective_sample_size/LEVEL of the step's mini-batch is ESS / B; sequence in the paper, which falls to "
        "1 / B for responses of many thousand tokens"
    )
    exponent: float = Field(default=0.5, gt=0, description="0.5 in the paper")
    base: float = Field(default=1.0, gt=0, le=1, description="ESS / B from which the rate is whole; 1 in the paper")


class OptimizerConfig(OptimizerSettings):
    """AdamW. The rate rises linearly over the warm-up and stays."""

    learning_rate: float = Field(gt=0, description="after the warm-up")
    warm_up_steps: int = Field(ge=0, description="in global steps (each is updates_per_step optimizer steps)")
    sample_size: SampleSizeConfig | None = Field(
        default=None, description="null: the rate does not depend on the effective sample size of the mini-batch"
    )


class ActorConfig(Section):
    """How the trained policy is updated."""

    optimizer: OptimizerConfig = Field(description="AdamW and its rate")
    updates_per_step: int = Field(ge=1, description="mini-batches, so optimizer steps, per global step")
    max_tokens_per_micro_batch: MayChange[int] = Field(
        ge=1, description="packed tokens of one forward pass, summed over its context-parallel ranks"
    )
    recompute: MayChange[Literal["none", "selective", "full"]] = Field(description="which activations the backward pass computes again")
    layers: MayChange[Literal["auto", "local", "transformer_engine"]] = Field(
        default="auto", description="auto: TransformerEngine's on GPUs where it imports, else this project's own"
    )
    logprob_chunk_tokens: int = Field(
        ge=1,
        description="tokens whose logits exist at once: memory grows with it, time falls until about 128 (tests/benchmarks/logprobs.py)",
    )
    routing_replay: Literal["none", "trainer", "server"] = Field(
        default="none",
        description="whose choice of experts a batch is trained with; none: the router's own in each pass; trainer: the one it made "
        "when it scored the batch (R2); server: the one the server made when it sampled, also for scoring (R3). Needs a model with experts",
    )
    kept_weights: MayChange[Literal["device", "pinned_host"]] = Field(
        default="device", description="where the overlapped schedule keeps the weights that sample: beside the model, or in host memory"
    )


class ParallelConfig(Section):
    """How the model is spread over the trainer's ranks. What is legal for which model is decided by parallel.layout."""

    tp: int = Field(default=1, ge=1, description="tensor parallelism")
    pp: int = Field(default=1, ge=1, description="pipeline stages")
    vpp: int | None = Field(default=None, ge=2, description="virtual stages per pipeline rank; null: none")
    count_embedding_as_layer: bool = Field(default=False, description="stages are even with the embedding as a layer of the first one")
    count_loss_as_layer: bool = Field(default=False, description="stages are even with the head and the loss as a layer of the last one")
    layers_in_first_stage: int | None = Field(
        default=None, ge=1, description="over all virtual stages of the first pipeline rank; the other ranks share the rest evenly"
    )
    layers_in_last_stage: int | None = Field(default=None, ge=1, description="over all virtual stages of the last pipeline rank")
    layers_per_stage: tuple[int, ...] | None = Field(
        default=None, strict=False, description="pp * vpp numbers, in the model's order; null: as the keys above say, else all alike"
    )
    cp: int = Field(default=1, ge=1, description="context parallelism")
    ep: int = Field(default=1, ge=1, description="expert parallelism")
    etp: int = Field(default=1, ge=1, description="tensor parallelism inside an expert")
    dp: int | None = Field(default=None, ge=1, description="data parallelism; null: what is left of world_size")
    sequence_parallel: bool | None = Field(default=None, description="null: on exactly when tp > 1")


class CheckpointConfig(Section):
    """When the run's whole state is saved."""

    every: int = Field(default=10, ge=1, description="global steps between checkpoints; the last step always has one")
    every_minutes: float | None = Field(
        default=None,
        gt=0,
        description="most minutes between checkpoints, beside every: also written between two updates of a global step; null: no limit",
    )
    stop_within_s: float | None = Field(
        default=None,
        gt=0,
        description="seconds that a stop may take until its checkpoint is on disk: a run that needs more says so; null: no limit. The job "
        "script sets it to STOP_WITHIN",
    )
    keep: int = Field(
        default=2,
        ge=1,
        description="newest checkpoints kept, and the one from which a finished run can be prolonged; one more while one is written",
    )


class TrackerConfig(Choice):
    """One place that the run's numbers go to, beside metrics.jsonl. A name alone stands for {name: ...} without options."""

    name: str = Field(description="tensorboard, wandb, or package.module:function")

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TrackingConfig(Section):
    """What is written down while the run goes."""

    trackers: tuple[TrackerConfig, ...] = Field(
        default=(TrackerConfig(name="tensorboard"),),
        strict=False,
        description="where metrics go beside metrics.jsonl: tensorboard, wandb, {name: package.module:function, option: ...}; may be []",
    )
    keep_rollouts: bool = Field(default=True, description="every sampled response as readable JSON lines in RUN/rollouts")
    token_groups: int = Field(
        default=2,
        ge=0,
        description="groups of a batch of which RUN/tokens keeps each token's log-probs, ratio and weight, 34 bytes a token; 0: none",
    )
    report: bool = Field(default=True, description="write RUN/report.html, a page of curves and tokens, when the run is complete")
    report_at_checkpoints: bool = Field(
        default=False,
        description="write RUN/report.html after each checkpoint too, in a process of its own; a job of several nodes: minpro report RUN",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="of the log files")


class ProfileConfig(Section):
    """Which global steps the torch profiler traces."""

    steps: str | int | None = Field(default=None, description="global steps to trace, first to last, as in 3-5; null: none")

    @model_validator(mode="after")
    def _is_a_range(self) -> ProfileConfig:
        found = None if self.steps is None else re.fullmatch(r"(\d+)(?:-(\d+))?", str(self.steps))
        if self.steps is not None and (found is None or int(found[1]) > int(found[2] or found[1])):
            raise ValueError(f"steps = {self.steps!r}: expected the first and last global step, as in 3-5, or one, as in 3")
        return self

    @property
    def first_and_last(self) -> tuple[int, int] | None:
        """None when nothing is traced."""
        if self.steps is None:
            return None
        first, _, last = str(self.steps).partition("-")
        return int(first), int(last or first)


class DebugConfig(Section):
    """Checks that cost time."""

    check_weights: MayChange[bool] = Field(default=False, description="after every sync, prove that servers and actor hold equal weights")
    deterministic: bool = Field(default=True, description="refuse operations whose result depends on timing")
