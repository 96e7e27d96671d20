"""One rollout server: seconds of a prefill, seconds of a decoding step, and room for keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.planner.efficiency import DEFAULT, Efficiency
from parallel.planner.hardware import Hardware
from parallel.planner.shape import ModelShape

# A layer's time in a decoding step beside reading memory and products: kernels that start one after the other. Judged from single
# responses, about 170 tokens/s of Qwen3-30B-A3B on an H100, not fitted; two small all-reduces come on top.
_LAYER_LATENCY_US = 90.0
_CACHE_SHARE = 0.85  # of the memory beside the weights that the server gives to keys and values


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutServer:
    """What the time of a server depends on: the model's sizes and the speed of its GPUs."""

    room_tokens: float  # whose keys and values fit
    always_read_bytes: float  # weights that every decoding step reads
    expert_bytes: float  # of all experts
    expert_share: float  # of its layer's experts that one token uses
    cache_bytes: float  # keys and values of one token
    flops_token: float  # forward, without attention to earlier tokens
    flops_context: float  # more of them for every earlier token
    bytes_per_s: float
    decode_flops_per_s: float
    prefill_flops_per_s: float
    latency_s: float  # of one decoding step, however little it does

    def prefill_s(self, tokens: float) -> float:
        """Seconds of reading a text."""
        return tokens * (self.flops_token + self.flops_context * tokens) / self.prefill_flops_per_s

    def step_s(self, alive: float, context: float) -> float:
        """Seconds of one token for each of `alive` responses that have `context` tokens on average.

        Weights that are used and the cache are read at memory speed.
        """
        touched = 1 - (1 - self.expert_share) ** alive
        read = self.always_read_bytes + touched * self.expert_bytes + alive * context * self.cache_bytes
        work = alive * (self.flops_token + self.flops_context * context)
        return read / self.bytes_per_s + work / self.decode_flops_per_s + self.latency_s


def rollout_server(shape: ModelShape, hardware: Hardware, *, tp: int, efficiency: Efficiency = DEFAULT) -> RolloutServer:
    """A server of `tp` GPUs. Raises ValueError when the weights leave no memory for keys and values."""
    free = hardware.usable_bytes - 2 * shape.total_parameters / tp
    if free <= 0:
        raise ValueError(
            f"rollout.tp: {tp} GPUs of {hardware.name} hold {hardware.usable_bytes * tp / 1e9:.0f} GB, "
            f"the weights are {2e-9 * shape.total_parameters:.0f} GB"
        )
    expert = shape.expert_parameters
    fixed = shape.flops_per_token(0) / 3
    peak = hardware.peak_flops("bf16" if "bf16" in hardware.peak_tflops else "fp32")
    reduction = hardware.nvlink_latency_us if tp <= hardware.nvlink_domain else hardware.network_latency_us
    return RolloutServer(
        room_tokens=_CACHE_SHARE * free * tp / cache_bytes(shape),
        always_read_bytes=2 * (shape.total_parameters - expert),
        expert_bytes=2 * expert,
        expert_share=shape.top_k / shape.num_experts if shape.is_moe else 0.0,
        cache_bytes=cache_bytes(shape),
        flops_token=fixed,
        flops_context=shape.flops_per_token(1) / 3 - fixed,
        bytes_per_s=tp * 1e9 * hardware.memory_bandwidth_gbs * efficiency.memory,
        decode_flops_per_s=tp * efficiency.grouped_gemm * peak,
        prefill_flops_per_s=tp * efficiency.gemm * peak,
        latency_s=shape.num_layers * (_LAYER_LATENCY_US + (2 * reduction if tp > 1 else 0.0)) * 1e-6,
    )


def cache_bytes(shape: ModelShape) -> float:
    """bf16 keys and values of one token."""
    return 2 * shape.num_layers * 2 * shape.key_width
