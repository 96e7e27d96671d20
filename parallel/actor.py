"""MegatronActor: one policy on any layout. Scores sequences, takes optimizer steps, hands out and keeps its weights.

Every method is collective: all ranks call it with the same arguments, and get the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_convert.mapping import Architecture
from parallel import actor_checkpoint
from parallel.capabilities import Capabilities
from parallel.expert_rows import check_shape
from parallel.finite import FiniteWatch
from parallel.layers.router import check_router_options, routed_layers
from parallel.layout import ParallelLayout
from parallel.logprobs import token_logprobs
from parallel.mcore import DistributedDataParallel, Float16Module, finalize_model_grads
from parallel.megatron_options import check_effect, check_machine_options, check_options
from parallel.model import ABSENT_FROM_QWEN3, TRANSFORMER_FIELDS, HiddenStateModel, build_model_chunks, transformer_config
from parallel.optimizer import (
    NOT_OFFERED,
    OPTIMIZER_FIELDS,
    apply_settings,
    build_optimizer,
    clip_and_step,
    set_learning_rate,
)
from parallel.optimizer_settings import OptimizerSettings
from parallel.overlap import OVERLAP_FIELDS, connect, data_parallel_config, settle_weights
from parallel.packing import MicroBatch, break_even_tokens, build_micro_batch, check_sequences, common_sizes, plan_replicas
from parallel.process_groups import ProcessGroups
from parallel.reduction import MetricSum
from parallel.routing_replay import RoutingCounts, RoutingPass, RowSink, check_replay
from parallel.schedule import run_micro_batches
from parallel.sequence_shard import SequenceShard
from parallel.token_sequence import TokenSequence
from parallel.top_tokens import ScoredTopTokens
from parallel.weight_snapshot import SnapshotPlace, WeightSnapshot
from parallel.weights import WeightExporter, load_weights, local_parameters, mark_tensor_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSettings:
    """How the actor computes; what it optimises comes with each update."""

    dtype: torch.dtype
    recompute: str
    max_tokens_per_micro_batch: int
    logprob_chunk_tokens: int
    temperature: float
    optimizer: OptimizerSettings
    megatron_options: Mapping[str, Any]


Result = TypeVar("Result", covariant=True)


class TokenFunction(Protocol[Result]):
    """What the caller makes of one micro-batch on one rank. T: this rank's packed tokens, padding (masked) included."""

    def __call__(
        self,
        *,
        logprobs_T: Tensor,
        entropy_T: Tensor,
        loss_mask_T: Tensor,
        streams: Mapping[str, Tensor],
        top: ScoredTopTokens | None,
        shard: SequenceShard,
        global_tokens: int,
        global_sequences: int,
    ) -> Result:
        """
        Args:
            logprobs_T: fp32, carries the gradient.
            entropy_T: fp32, detached.
            loss_mask_T: bool.
            streams: fp32 [T] each, those of the sequences.
            top: log-probs of the sequences' top tokens, which carry the gradient too; None where the sequences have none.
            shard: where the tokens belong.
            global_tokens: trained tokens of the whole mini-batch.
            global_sequences: its sequences with at least one trained token.
        """
        ...


# The micro-batch's share of the mini-batch loss, and metrics: sums and counts. Both add up over ranks and micro-batches.
LossFunction = TokenFunction[tuple[Tensor, Mapping[str, Tensor]]]

# Of one optimizer step. A function sees sums that are equal on all ranks, and so must its result be.
LearningRate = float | Callable[[Mapping[str, Tensor]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """One optimizer step. Equal on all ranks."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    policy_version: int  # after the step
    num_tokens: int  # trained tokens
    metrics: Mapping[str, Tensor]  # fp64 sums over the mini-batch
    routing: RoutingCounts | None = None  # what the routers replayed; None: nothing


def check_option_names(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is unknown to the installed Megatron-Core, decided here, or not known to be harmless."""
    known = TRANSFORMER_FIELDS | OPTIMIZER_FIELDS | OVERLAP_FIELDS
    check_options(options, known, {**ABSENT_FROM_QWEN3, **NOT_OFFERED}, section="megatron")
    check_router_options(options)
    data_parallel_config({name: value for name, value in options.items() if name in OVERLAP_FIELDS})


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options for the model, the optimizer and data parallelism. What two of them know (fp8_recipe) goes to both.

    An unknown name goes to the model, whose configuration refuses it.
    """
    only_elsewhere = (OPTIMIZER_FIELDS | OVERLAP_FIELDS) - TRANSFORMER_FIELDS
    return (
        {name: value for name, value in options.items() if name not in only_elsewhere},
        {name: value for name, value in options.items() if name in OPTIMIZER_FIELDS},
        {name: value for name, value in options.items() if name in OVERLAP_FIELDS},
    )


class MegatronActor:
    """See the module. Build it after `process_groups.initialize`, then `load_hugging_face` or `load`."""

    def __init__(
        self,
        architecture: Architecture,
        layout: ParallelLayout,
        groups: ProcessGroups,
        capabilities: Capabilities,
        settings: ActorSettings,
    ) -> None:
        """Raises ValueError for a model that the layout cannot hold, and for an unknown Megatron option."""
        layout.check_model(architecture)
        check_effect(settings.megatron_options, architecture, recompute=settings.recompute)
        check_machine_options(settings.megatron_options, capabilities)
        self.architecture = architecture
        self.layout = layout
        self.policy_version = 0  # optimizer steps applied
        self.routing: RoutingCounts | None = None  # what the routers replayed or recorded in the latest pass; None: nothing
        self.kept_version: int | None = None  # policy version of the weights that `keep_weights` kept last
        self._snapshot: WeightSnapshot | None = None
        self._is_validated = False  # whether Megatron has checked the shards of a checkpoint of this actor
        self._groups = groups
        self.settings = settings
        self._device = torch.device(capabilities.device_type)
        model_options, optimizer_options, overlap_options = split_options(settings.megatron_options)
        self._config = transformer_config(
            architecture, layout, capabilities, dtype=settings.dtype, recompute=settings.recompute, options=model_options
        )
        self._modules: list[HiddenStateModel] = build_model_chunks(architecture, layout, self._config, capabilities)
        self._routed_layers = routed_layers(self._modules)
        self._local = local_parameters(self._modules, architecture, layout, groups)
        mark_tensor_parallel(self._local, architecture)
        wrapped = [Float16Module(self._config, module) if settings.dtype == torch.bfloat16 else module for module in self._modules]
        ddp_config = data_parallel_config(overlap_options)
        self._chunks = [
            DistributedDataParallel(self._config, ddp_config, module, disable_bucketing=index > 0) for index, module in enumerate(wrapped)
        ]
        connect(self._config, self._chunks, self._modules)
        # The loss is already divided by its global denominator; Megatron is not to divide by a token count as well.
        self._config.finalize_model_grads_func = lambda model, num_tokens=None, **kwargs: finalize_model_grads(model, None, **kwargs)
        self._optimizer = build_optimizer(self._chunks, settings.optimizer, dtype=settings.dtype, options=optimizer_options)
        self._exporter = WeightExporter(self._local, architecture, layout, groups)
        source_rank = layout.first_rank_of_last_stage
        self._sum_metrics = MetricSum(source_rank=source_rank, control_group=groups.control, device=self._device)
        self._sum_statistics = MetricSum(source_rank=source_rank, control_group=groups.control, device=self._device)

    # -- weights ------------------------------------------------------------------------------------------------------

    def load_hugging_face(self, read: Callable[[str], Tensor]) -> None:
        """Take weights from a Hugging Face checkpoint; read(name) returns one tensor. The optimizer's master copy follows."""
        load_weights(self._local, self.architecture, self.layout, self._groups, read)
        self._optimizer.reload_model_params()

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and tensors, streamed to rank 0 bucket by bucket. Other ranks must iterate and get nothing."""
        settle_weights(self._chunks)
        return iter(self._exporter)

    def save(self, directory: Path) -> None:
        """Model and optimizer as a Megatron torch_dist checkpoint in an existing, empty directory. Loads onto other layouts."""
        self.capture(directory).write(self._groups.control)

    def capture(self, directory: Path) -> actor_checkpoint.Captured:
        """A copy of the state as it is now, which writes what `save` would write; see actor_checkpoint.capture."""
        settle_weights(self._chunks)
        captured = actor_checkpoint.capture(directory, self._modules, self._optimizer, validate=not self._is_validated)
        self._is_validated = True
        return captured

    def load(self, directory: Path, *, policy_version: int) -> None:
        """The counterpart of `save`. policy_version: optimizer steps that the saved weights have behind them."""
        actor_checkpoint.load(directory, self._modules, self._optimizer)
        apply_settings(self._optimizer, self.settings.optimizer)  # the checkpoint holds the settings of the run that saved it
        self.policy_version = policy_version

    def load_model(self, directory: Path) -> None:
        """Take weights alone from a torch_dist checkpoint, as `minpro convert hf-to-megatron` writes it. The optimizer's copy follows."""
        actor_checkpoint.load_model(directory, self._modules)
        self._optimizer.reload_model_params()

    # -- the weights of an earlier version ----------------------------------------------------------------------------

    def keep_weights(self, *, place: SnapshotPlace = "device") -> None:
        """Keep a copy of the weights as they are now, until the next call. The first call reserves the memory.

        Args:
            place: where the copy lies, see WeightSnapshot.

        Raises:
            ValueError: for weights that cannot be kept (see WeightSnapshot).
        """
        settle_weights(self._chunks)
        if self._snapshot is None:
            self._snapshot = WeightSnapshot(self._chunks, self._local, place=place)
        self._snapshot.keep()
        self.kept_version = self.policy_version

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Inside the block the model has the kept weights and their policy version. No update, save or load may happen in it.

        Raises:
            ValueError: when no weights were kept.
        """
        if self._snapshot is None or self.kept_version is None:
            raise ValueError("no weights are kept; call keep_weights first")
        latest = self.policy_version
        self._swap(self._snapshot, policy_version=self.kept_version)
        try:
            yield
        finally:
            self._swap(self._snapshot, policy_version=latest)

    def capture_kept(self, directory: Path) -> actor_checkpoint.Captured:
        """A copy of the kept weights, which writes them for `load_kept`; see actor_checkpoint.capture_model."""
        with self.kept_weights():
            return actor_checkpoint.capture_model(directory, self._modules, validate=not self._is_validated)

    def load_kept(self, directory: Path, *, policy_version: int, place: SnapshotPlace = "device") -> None:
        """Keep the weights that `capture_kept` wrote. The model's own weights and the optimizer stay as they are.

        Args:
            directory: what the function of `capture_kept` filled, also on another layout.
            policy_version: optimizer steps that these weights have behind them.
            place: where the copy lies, also of weights that are kept later.
        """
        self.keep_weights(place=place)
        with self.kept_weights():
            actor_checkpoint.load_model(directory, self._modules)
        self.kept_version = policy_version

    def _swap(self, snapshot: WeightSnapshot, *, policy_version: int) -> None:
        settle_weights(self._chunks)
        snapshot.swap()
        self.policy_version = policy_version

    # -- forward and backward -----------------------------------------------------------------------------------------

    def logprobs(
        self, sequences: Sequence[TokenSequence], *, record: RowSink | None = None, entropies: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Log-probabilities under the current weights, no gradient: one fp32 CPU tensor [num_tokens - 1] per sequence.

        Args:
            sequences: with rows of experts that are replayed, or without.
            record: takes the routers' own choice; the sequences then have no rows. Every rank writes what it computed.
            entropies: gets the entropies of the same distributions, one tensor like the log-probabilities per sequence.

        Raises:
            ValueError: malformed sequences.
            FloatingPointError: a NaN or infinity where a loss mask is True.
        """
        watch, routing = self._watch(), self._routing(sequences, record)
        scored: dict[int, list[Tensor]] = {}  # log-probs and, where wanted, entropies of a sequence

        def keep(micro_batch: MicroBatch, hidden: Tensor, module: HiddenStateModel) -> tuple[Tensor, Tensor, None]:
            logprobs_T, entropy_T = self._score(
                micro_batch, micro_batch.labels_T, hidden, module, watch, with_entropy=entropies is not None
            )
            if micro_batch.indices:
                values = [micro_batch.shard.assemble(x_T) for x_T in (logprobs_T, entropy_T) if x_T is not None]
                scored.update(zip(micro_batch.indices, map(list, zip(*values, strict=True)), strict=False))  # padding may follow
            return logprobs_T.sum(), torch.zeros((), dtype=torch.int), None

        with torch.no_grad():
            self._run(self._micro_batches(sequences, routing), keep, forward_only=True)
        watch.raise_together("nothing is scored")
        self._end_routing(routing)
        sizes = [sequence.num_positions for sequence in sequences]
        flat = torch.zeros(1 if entropies is None else 2, sum(sizes), dtype=torch.float32, device=self._device)
        place = self._groups.coordinates
        if place.tp == 0 and place.cp == 0:  # one rank speaks for each replica
            parts = [row.split(sizes) for row in flat]
            for index, values in scored.items():
                for part, value in zip(parts, values, strict=True):
                    part[index].copy_(value)
        dist.all_reduce(flat)
        logprobs, *rest = (list(row.split(sizes)) for row in flat.cpu())
        if entropies is not None:
            entropies += rest[0]
        return logprobs

    def sum_statistics(self, minibatch: Sequence[TokenSequence], statistics_fn: TokenFunction[Tensor]) -> Tensor:
        """Forward only: what statistics_fn makes of every micro-batch, added up over the mini-batch. fp64 on the CPU, on all ranks.

        For the few objectives that must know the whole mini-batch before any gradient. statistics_fn returns one shape always.
        """
        counts = _count(minibatch)
        watch, routing = self._watch(), self._routing(minibatch)
        totals: dict[str, Tensor] = {}

        def add(micro_batch: MicroBatch, hidden: Tensor, module: HiddenStateModel) -> tuple[Tensor, Tensor, None]:
            found = self._call(statistics_fn, micro_batch, hidden, module, watch, counts)
            _add_to(totals, {"statistics": found})
            return found.sum(), torch.zeros((), dtype=torch.int), None

        with torch.no_grad():
            self._run(self._micro_batches(minibatch, routing), add, forward_only=True)
        watch.raise_together(f"nothing changed, the policy stays at version {self.policy_version}")
        self._end_routing(routing)
        return self._sum_statistics(totals if self.speaks else None)["statistics"]

    def update(self, minibatch: Sequence[TokenSequence], loss_fn: LossFunction, *, learning_rate: LearningRate) -> UpdateReport:
        """Forward, backward, clip, step over one mini-batch. A learning rate that is a function gets the mini-batch's sums of metrics.

        Raises ValueError for a malformed mini-batch, on every rank and before anything is exchanged; FloatingPointError, on every
        rank, when one of them meets a NaN or infinity at a trained token, or the gradient is not finite: no step is taken then.
        """
        counts = _count(minibatch)
        watch, routing = self._watch(), self._routing(minibatch)
        unchanged = f"not stepped, the policy stays at version {self.policy_version}"
        totals: dict[str, Tensor] = {}

        def compute_loss(micro_batch: MicroBatch, hidden: Tensor, module: HiddenStateModel) -> tuple[Tensor, Tensor, None]:
            loss, metrics = self._call(loss_fn, micro_batch, hidden, module, watch, counts)
            _add_to(totals, {"loss": loss.detach(), **metrics})
            return loss, torch.zeros((), dtype=torch.int), None

        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._run(self._micro_batches(minibatch, routing), compute_loss, forward_only=False)
        watch.raise_together(unchanged)
        self._end_routing(routing)
        sums = self._sum_metrics(totals if self.speaks else None)

        rate = learning_rate(sums) if callable(learning_rate) else learning_rate
        set_learning_rate(self._optimizer, rate, weight_decay=self.settings.optimizer.weight_decay)
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}; {unchanged}")
        clip_and_step(self._optimizer, grad_norm=grad_norm)
        self.policy_version += 1
        return UpdateReport(
            loss=float(sums.pop("loss")),
            grad_norm=grad_norm,
            learning_rate=rate,
            policy_version=self.policy_version,
            num_tokens=counts.tokens,
            metrics=sums,
            routing=self.routing,
        )

    @property
    def speaks(self) -> bool:
        """One rank of each tensor-parallel group of the last stage contributes to sums."""
        return self._groups.is_last_stage and self._groups.coordinates.tp == 0

    def _watch(self) -> FiniteWatch:
        return FiniteWatch(rank=self._groups.coordinates.rank, control_group=self._groups.control)

    def _call(
        self,
        function: TokenFunction[Any],
        micro_batch: MicroBatch,
        hidden: Tensor,
        module: HiddenStateModel,
        watch: FiniteWatch,
        counts: _Counts,
    ) -> Any:
        labels, behaviour_TK = micro_batch.labels_T, None
        if micro_batch.top is not None:
            ids_TK, behaviour_TK = micro_batch.top.read(self._device)
            labels = torch.cat([labels[:, None], ids_TK], dim=1)
            del ids_TK
        logprobs, entropy_T = self._score(micro_batch, labels, hidden, module, watch, with_entropy=True)
        del labels
        assert entropy_T is not None
        scored_top = None
        if behaviour_TK is not None:
            scored_top = ScoredTopTokens(logprobs_TK=logprobs[:, 1:], behaviour_logprobs_TK=behaviour_TK)
        return function(
            logprobs_T=logprobs if scored_top is None else logprobs[:, 0],
            entropy_T=entropy_T,
            loss_mask_T=micro_batch.loss_mask_T,
            streams=micro_batch.streams,
            top=scored_top,
            shard=micro_batch.shard,
            global_tokens=counts.tokens,
            global_sequences=counts.sequences,
        )

    def _score(
        self, micro_batch: MicroBatch, labels: Tensor, hidden: Tensor, module: HiddenStateModel, watch: FiniteWatch, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """labels: [T], or [T, L] with further ones."""
        logprobs, entropy_T = token_logprobs(
            module.head_input(hidden),
            module.head_weight(),
            labels,
            temperature=self.settings.temperature,
            tp_group=self._groups.tp,
            chunk_tokens=self.settings.logprob_chunk_tokens,
            vocab_size=self.architecture.vocab_size,
            with_entropy=with_entropy,
        )
        return watch.screen(logprobs, micro_batch), entropy_T

    def _routing(self, sequences: Sequence[TokenSequence], record: RowSink | None = None) -> RoutingPass | None:
        """What this pass replays or records. None where no sequence has rows: the routers choose. A sequence without is then missing."""
        self.routing = None
        if record is None and all(sequence.experts is None for sequence in sequences):
            return None
        check_replay(self.settings.megatron_options, self.architecture)
        for index, sequence in enumerate(sequences):
            if sequence.experts is not None:
                if record is not None:
                    raise ValueError(f"sequence {index}: has rows of experts; expected none in a pass that records them")
                check_shape(sequence.experts, self.architecture, source=f"sequence {index}")
        assert self.architecture.num_experts is not None
        tp = self._groups.tp
        return RoutingPass(
            num_experts=self.architecture.num_experts,
            layers=self._routed_layers,
            tp_part=(tp.rank(), tp.size()) if self.layout.sequence_parallel else (0, 1),
            device=self._device,
            sink=record,
        )

    def _end_routing(self, routing: RoutingPass | None) -> None:
        if routing is not None:
            self.routing = routing.finish()

    def _micro_batches(self, sequences: Sequence[TokenSequence], routing: RoutingPass | None = None) -> list[MicroBatch]:
        check_sequences(sequences, vocab_size=self.architecture.vocab_size)
        lengths = [sequence.num_positions for sequence in sequences]
        budget = self.settings.max_tokens_per_micro_batch
        plan = plan_replicas(lengths, self.layout, max_tokens=budget, break_even=break_even_tokens(self.architecture))
        # The allgather dispatcher exchanges equal parts: all ranks that share experts need equally many tokens.
        equal = self._config.moe_token_dispatcher_type == "allgather" and self.layout.ep * self.layout.etp > 1
        sizes = common_sizes(plan, lengths, self.layout) if equal else [0] * len(plan[0])
        return [
            build_micro_batch(sequences, indices, self.layout, cp_group=self._groups.cp, device=self._device, fill_to=size, routing=routing)
            for indices, size in zip(plan[self._groups.coordinates.dp], sizes, strict=True)
        ]

    def _run(self, micro_batches: list[MicroBatch], finish: Callable[..., tuple[Tensor, Tensor, None]], *, forward_only: bool) -> None:
        """See `run_micro_batches`. finish(micro_batch, hidden, module) runs on the last stage."""
        run_micro_batches(
            self._chunks,
            micro_batches,
            lambda micro_batch, hidden: finish(micro_batch, hidden, self._modules[-1]),
            layout=self.layout,
            stage=self._groups.coordinates.pp,
            hidden_size=self.architecture.hidden_size,
            forward_only=forward_only,
        )


class _Counts(NamedTuple):
    tokens: int
    sequences: int


def _count(minibatch: Sequence[TokenSequence]) -> _Counts:
    """Trained tokens, and sequences with at least one. Raises ValueError for a mini-batch without any."""
    tokens = sum(int(sequence.loss_mask.sum()) for sequence in minibatch)
    if tokens == 0:
        raise ValueError(f"minibatch: none of its {len(minibatch)} sequences has a trained token")
    return _Counts(tokens, sum(bool(sequence.loss_mask.any()) for sequence in minibatch))


def _add_to(totals: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value if name in totals else value
