"""The plan of what was rehearsed: the same rank, model, layout, micro-batch and options."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.planner.memory import StageMemory, stage_memory
from parallel.planner.shape import from_config
from parallel.planner.training import Batch, Training
from parallel.rehearsal.result import RehearsalResult

MOST_ABOVE, MOST_BELOW = 0.03, 0.01  # by which the plan may differ from the rehearsal's peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """One rehearsed rank beside its plan."""

    result: RehearsalResult
    planned: StageMemory

    @property
    def error(self) -> float:
        """By how much of the rehearsed peak the plan is above it; negative is below."""
        return self.planned.total / self.result.fullest.peak - 1

    @property
    def agrees(self) -> bool:
        return -MOST_BELOW <= self.error <= MOST_ABOVE


def parity(result: RehearsalResult) -> Parity:
    """The result beside the plan of its request. Raises ValueError for a rehearsal that a fault ended."""
    request = result.request
    if result.fault is not None:
        raise ValueError(f"{request.model_name}, rank {request.rank}: the rehearsal ended in {result.fault.phase}: {result.fault.message}")
    training = Training(
        precision="bf16" if request.dtype == "bfloat16" else "fp32",
        spec="local",
        on_cpu=False,
        recompute=request.recompute,  # type: ignore[arg-type]
        dispatcher="alltoall",
        overlap=False,
        cuda_graphs="none",
        fp8_attention=False,
        fsdp=False,
        imbalance=1.0,  # the rehearsal's router is balanced
        gradient_bytes=4,
        chunk_tokens=request.logprob_chunk_tokens,
        release=26.06,
        top_tokens=request.top_tokens,
    )
    batch = Batch(
        micro_batch_tokens=result.micro_batch_tokens * request.layout.cp,
        num_micro_batches=result.micro_batches,
        sequence_length=max(request.lengths),
    )
    shape = from_config(request.model, name=request.model_name, source=request.model_name)
    planned = stage_memory(shape, request.layout, result.stage, training, batch, keeps_weights=request.kept_weights == "device")
    return Parity(result=result, planned=planned)
