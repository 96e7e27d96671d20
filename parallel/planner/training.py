"""Training: how a model is trained on a layout, with everything that moves memory or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp8", "mxfp8"]
Dispatcher = Literal["alltoall", "deepep", "hybridep"]
Recompute = Literal["none", "selective", "full"]
CudaGraphs = Literal["none", "partial", "full"]
Spec = Literal["fused", "local"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DISPATCHERS: tuple[Dispatcher, ...] = get_args(Dispatcher)
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
CUDA_GRAPHS: tuple[CudaGraphs, ...] = get_args(CudaGraphs)
SPECS: tuple[Spec, ...] = get_args(Spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One way to train.

    spec: whose layers run. "fused": TransformerEngine's; "local": this project's own, which save more for the backward pass.
    on_cpu: the local layers attend in grids and multiply expert by expert there, not with CUDA's kernels.
    chunk_tokens: tokens whose logits exist at once; None holds the logits of the whole micro-batch (Megatron's own head).
    imbalance: tokens of the busiest expert-parallel rank over the mean; 1 is forced balance.
    overlap: dispatch and combine of one micro-batch run beside the computation of another.
    cuda_graphs: "partial" captures attention or router of each layer, "full" the whole iteration.
    fp8_attention: the core of attention in fp8 too, where the products are.
    release: of the training stack, year and month, as 25.11: kernels per layer fell from release to release.
    top_tokens: further tokens whose log-probs the loss needs at every position; 0 without score centering.
    """

    precision: Precision
    spec: Spec
    on_cpu: bool
    recompute: Recompute
    dispatcher: Dispatcher
    overlap: bool
    cuda_graphs: CudaGraphs
    fp8_attention: bool
    fsdp: bool
    imbalance: float
    gradient_bytes: int
    chunk_tokens: int | None
    release: float
    top_tokens: int = 0

    @property
    def element_bytes(self) -> int:
        """Of activations and of the parameters that the forward pass reads (fp8 keeps bf16 outside its products)."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one replica works through in one optimizer step.

    micro_batch_tokens: packed tokens of one micro-batch over its context-parallel ranks.
    sequence_length: mean over tokens of the length of the sequence that they are in; decides attention's share.
    """

    micro_batch_tokens: int
    num_micro_batches: int
    sequence_length: float
