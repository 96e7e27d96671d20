"""Seconds of one layer's kernels on one GPU, forward and backward, for one micro-batch.

A product takes FLOPs / (efficiency x peak) + bytes / bandwidth. The sum instead of the larger of the two gives both the published
curve of large products (660 to 830 TFLOP/s on H100) and that of experts with few rows (79 to 460 TFLOP/s for 32 to 1,024 rows each).
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.layout import ParallelLayout
from parallel.planner.efficiency import Efficiency
from parallel.planner.hardware import Hardware
from parallel.planner.shape import ModelShape
from parallel.planner.training import Batch, Training

# Kernels of a dense layer beside those of a layer with experts: no routing, no permutation.
DENSE_SHARE = 0.4
# Launches fell release by release between 25.11 and 26.04.
_MONTHS_OF_FUSION = 5
_ATTENTION_BACKWARD_PRODUCTS = 2.5  # flash attention: five products against two


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Forward and backward of something."""

    forward: float
    backward: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(forward=self.forward + other.forward, backward=self.backward + other.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


ZERO = Seconds(forward=0.0, backward=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and how products run."""

    hardware: Hardware
    efficiency: Efficiency
    precision: str

    @property
    def is_low(self) -> bool:
        return self.precision in ("fp8", "mxfp8")

    @property
    def bytes_per_second(self) -> float:
        return 1e9 * self.hardware.memory_bandwidth_gbs * self.efficiency.memory

    def product(self, rows: float, columns: float, inner: float, *, count: float = 1.0, grouped: bool = False, wide: bool = False) -> float:
        """Seconds of `count` products [rows, inner] x [inner, columns]. grouped: many small ones in one launch. wide: never in fp8."""
        low = self.is_low and not wide
        rate = self.efficiency.gemm if not grouped else self.efficiency.grouped_gemm
        if low:
            rate = self.efficiency.fp8_gemm if not grouped else self.efficiency.fp8_grouped_gemm
        base = "fp32" if self.precision == "fp32" else "bf16"
        peak = self.hardware.sustained * self.hardware.peak_flops(self.precision if low else base)
        element = 4 if self.precision == "fp32" else 2
        moved = (rows * inner + inner * columns) * (1 if low else element) + rows * columns * element
        return count * (2 * rows * columns * inner / (rate * peak) + moved / (1e9 * self.hardware.memory_bandwidth_gbs))

    def linear(
        self, rows: float, columns: float, inner: float, *, count: float = 1.0, grouped: bool = False, wide: bool = False
    ) -> Seconds:
        """A linear map: its product, and the two of the backward pass."""
        options = {"count": count, "grouped": grouped, "wide": wide}
        backward = self.product(rows, inner, columns, **options) + self.product(columns, inner, rows, **options)  # type: ignore[arg-type]
        return Seconds(forward=self.product(rows, columns, inner, **options), backward=backward)  # type: ignore[arg-type]

    def moving(self, forward_bytes: float, backward_bytes: float) -> Seconds:
        """Element-wise kernels that read and write so much."""
        return Seconds(forward=forward_bytes / self.bytes_per_second, backward=backward_bytes / self.bytes_per_second)


def attention_seconds(shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training) -> Seconds:
    """The core: softmax(q k) v, causal."""
    t = batch.micro_batch_tokens / layout.cp
    flops = t * batch.sequence_length * shape.num_heads / layout.tp * (shape.qk_dim + shape.v_dim)
    peak = machine.hardware.sustained * machine.hardware.peak_flops("fp32" if machine.precision == "fp32" else "bf16")
    efficiency = machine.efficiency
    if training.fp8_attention:
        peak *= efficiency.fp8_attention
    # Short sequences: the diagonal's half-used blocks, and less work to spread, weigh more.
    peak *= 1 / (1 + efficiency.attention_half_length * layout.cp / batch.sequence_length)
    return Seconds(
        forward=flops / (peak * efficiency.attention_forward),
        backward=_ATTENTION_BACKWARD_PRODUCTS * flops / (peak * efficiency.attention_backward),
    )


def projections_seconds(shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch) -> Seconds:
    """The attention block's linear maps."""
    t = batch.micro_batch_tokens / layout.cp
    total = ZERO
    for weight in shape.attention:
        if weight.rows > 1:
            rows = weight.rows // layout.tp if weight.split else weight.rows
            total += machine.linear(t, rows, weight.columns)
    return total


def feed_forward_seconds(
    shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training, *, is_moe: bool
) -> Seconds:
    """Routed and shared experts, or the dense feed-forward part."""
    t = batch.micro_batch_tokens / layout.cp
    hidden = shape.hidden_size
    if not is_moe:
        f = shape.dense_ffn / layout.tp
        return machine.linear(t, 2 * f, hidden) + machine.linear(t, hidden, f)
    local_experts = shape.num_experts // layout.ep
    own = t / layout.tp if layout.sequence_parallel else t
    rows = own * layout.etp * shape.top_k * training.imbalance / local_experts
    f = shape.expert_ffn / layout.etp
    total = machine.linear(rows, 2 * f, hidden, count=local_experts, grouped=True)
    total += machine.linear(rows, hidden, f, count=local_experts, grouped=True)
    total += machine.linear(own, shape.num_experts, hidden, wide=True)
    if shape.shared_ffn:
        f = shape.shared_ffn / layout.tp
        total += machine.linear(t, 2 * f, hidden) + machine.linear(t, hidden, f)
    return total


def elementwise_seconds(
    shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training, *, is_moe: bool
) -> Seconds:
    """Norms, residuals, rotary embedding, activation, permutation of tokens, and in fp8 the casts: bytes read and written."""
    t = batch.micro_batch_tokens / layout.cp
    own = t / layout.tp if layout.sequence_parallel else t
    h, e = shape.hidden_size, training.element_bytes
    q, k = shape.query_width / layout.tp, shape.key_width / layout.tp
    v = shape.num_heads * shape.v_dim / layout.tp
    forward = own * 10 * h + t * 4 * (q + k)
    backward = own * 12 * h + t * 5 * (q + k)
    if is_moe:
        rows, f = own * layout.etp * shape.top_k * training.imbalance, shape.expert_ffn / layout.etp
        forward += 2 * (rows + own) * h + 3 * rows * f
        backward += 2 * (rows + own) * h + 5 * rows * f
        inputs, outputs = t * (h + v) + rows * (h + f), t * (h + q + 2 * k) + rows * (2 * f + h)
    else:
        f = shape.dense_ffn / layout.tp
        forward += t * 3 * f
        backward += t * 5 * f
        inputs, outputs = t * (2 * h + v + f), t * (2 * h + q + 2 * k + 2 * f)
    total = machine.moving(forward * e, backward * e)
    if machine.is_low:
        # Written along rows and along columns; read in bf16 unless fused into the kernel before; read once more for a scale per tensor.
        fused = machine.precision == "mxfp8" and training.release >= 26.06
        cast = 2 + (0 if fused else 2) + (2 if machine.precision == "fp8" else 0)
        total += machine.moving(inputs * cast, outputs * cast)
    return total


def head_seconds(shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training) -> Seconds:
    """The product with the vocabulary and the softmax over it. A chunked head computes the logits again in backward."""
    t = batch.micro_batch_tokens / layout.cp
    vocabulary = shape.vocab_size / layout.tp
    product = machine.linear(t, vocabulary, shape.hidden_size, wide=True)
    if training.chunk_tokens is None:
        return product + machine.moving(t * vocabulary * 12, t * vocabulary * 8)
    again = Seconds(forward=0.0, backward=product.forward)
    return product + again + machine.moving(t * vocabulary * 16, t * vocabulary * 24)


def host_seconds(shape: ModelShape, layout: ParallelLayout, machine: Machine, training: Training, *, is_moe: bool) -> float:
    """What the host needs to launch one layer's kernels, forward and backward."""
    efficiency = machine.efficiency
    launches = efficiency.launches_layer
    if machine.is_low:
        launches += efficiency.launches_fp8_layer
    if not is_moe:
        launches *= DENSE_SHARE
    else:
        per_expert = efficiency.launches_expert + (efficiency.launches_fp8_expert if machine.is_low else 0.0)
        launches += per_expert * (shape.num_experts // layout.ep)
    launches *= efficiency.release_2025 ** min(1.0, max(0.0, _months(26.04) - _months(training.release)) / _MONTHS_OF_FUSION)
    left = {"none": 1.0, "partial": efficiency.partial_graphs, "full": 0.0}[training.cuda_graphs]
    return launches * left * 1e-6 * machine.hardware.launch_us


def _months(release: float) -> int:
    """Of a release written as year.month, 25.11 for November 2025."""
    return 12 * int(release) + round(100 * (release - int(release)))
