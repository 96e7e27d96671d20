"""Seconds of one global step of reinforcement learning: sampling, log-probabilities, updates, weight sync, and what staleness hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parallel.planner.efficiency import DEFAULT, Efficiency
from parallel.planner.hardware import Hardware
from parallel.planner.shape import ModelShape

# A layer's time in a decoding step beside reading memory and products: kernels that start one after the other. Judged from single
# responses, about 170 tokens/s of Qwen3-30B-A3B on an H100, not fitted; two small all-reduces come on top.
_LAYER_LATENCY_US = 90.0
_WEIGHT_SYNC_GBS = 10.0  # one sender, gathering as it goes: 30B bf16 in 5 to 10 s in every published figure
_COLOCATED_CACHE_SHARE = 0.2  # of a GPU that the trainer uses too
_CACHE_SHARE = 0.85  # of the memory beside the weights that the server gives to keys and values


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """What is sampled in a global step, and by what. mean_tokens, max_tokens: of a response."""

    sequences: int
    prompt_tokens: float
    mean_tokens: float
    max_tokens: int
    servers: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalStep:
    """Seconds of the phases of one global step, and what `staleness` may hide of them.

    sampling_s: one batch alone. steady_sampling_s: with `staleness` batches under way, as far as the servers' memory lets them.
    """

    sampling_s: float
    steady_sampling_s: float
    logprobs_s: float
    updates_s: float
    sync_s: float
    staleness: int

    @property
    def on_policy_s(self) -> float:
        """One thing after the other."""
        return self.sampling_s + self.logprobs_s + self.updates_s + self.sync_s

    @property
    def step_s(self) -> float:
        """Staleness 1 lets servers sample beside the trainer; from 2 on the next batch fills them while the last responses finish."""
        if self.staleness == 0:
            return self.on_policy_s
        return max(self.steady_sampling_s, self.logprobs_s + self.updates_s) + self.sync_s

    @property
    def hidden_s(self) -> float:
        return self.on_policy_s - self.step_s


def sync_seconds(shape: ModelShape) -> float:
    """bf16 weights of the whole model from the trainer to the servers."""
    return 2 * shape.total_parameters / (1e9 * _WEIGHT_SYNC_GBS)


def server_bytes(shape: ModelShape, hardware: Hardware, rollouts: Rollouts) -> float:
    """Bytes of one server on a GPU it shares with the trainer: its part of the bf16 weights, and keys and values.

    The responses under way are half grown on average; what exceeds a fifth of the GPU waits its turn.
    """
    cache = rollouts.sequences / rollouts.servers * (rollouts.prompt_tokens + rollouts.mean_tokens / 2) * _cache_bytes(shape)
    return 2 * shape.total_parameters / rollouts.tp + min(cache / rollouts.tp, _COLOCATED_CACHE_SHARE * hardware.usable_bytes)


def sampling_seconds(
    shape: ModelShape, hardware: Hardware, rollouts: Rollouts, *, batches_under_way: int = 1, efficiency: Efficiency = DEFAULT
) -> float:
    """Seconds from one finished batch to the next, the servers sharing it evenly.

    Lengths are exponential, cut at max_tokens, with the given mean. One batch under way drains while its longest responses go on alone;
    of several, the next ones fill the servers meanwhile.
    Raises ValueError when the weights leave no memory for keys and values.
    """
    free = hardware.usable_bytes - 2 * shape.total_parameters / rollouts.tp
    if free <= 0:
        raise ValueError(
            f"rollout.tp: {rollouts.tp} GPUs of {hardware.name} hold {hardware.usable_bytes * rollouts.tp / 1e9:.0f} GB, "
            f"the weights are {2e-9 * shape.total_parameters:.0f} GB"
        )
    context = rollouts.prompt_tokens + rollouts.mean_tokens / 2
    room = _CACHE_SHARE * free * rollouts.tp / (context * _cache_bytes(shape))
    mine = rollouts.sequences / rollouts.servers
    together = max(1.0, min(mine * batches_under_way, room))
    prefill = mine * rollouts.prompt_tokens * shape.flops_per_token(rollouts.prompt_tokens) / 3
    prefill /= rollouts.tp * efficiency.gemm * hardware.peak_flops(_precision(hardware))
    if batches_under_way > 1:
        return prefill + mine / together * rollouts.mean_tokens * _decode_seconds(shape, hardware, rollouts, together, context, efficiency)
    scale = _exponential_scale(rollouts.mean_tokens, rollouts.max_tokens)
    intervals = 64
    width = rollouts.max_tokens / intervals
    draining = 0.0
    for index in range(intervals):
        position = (index + 0.5) * width
        alive = together * math.exp(-position / scale) if math.isfinite(scale) else together
        draining += width * _decode_seconds(shape, hardware, rollouts, max(1.0, alive), rollouts.prompt_tokens + position, efficiency)
    waiting = (mine / together - 1) * rollouts.mean_tokens * _decode_seconds(shape, hardware, rollouts, together, context, efficiency)
    return draining + waiting + prefill


def _decode_seconds(
    shape: ModelShape, hardware: Hardware, rollouts: Rollouts, alive: float, context: float, efficiency: Efficiency
) -> float:
    """One token for each of `alive` responses: weights touched and cache read at memory speed, plus latency of the layers."""
    expert = shape.expert_parameters
    touched = 1 - (1 - shape.top_k / shape.num_experts) ** alive if shape.is_moe else 0.0
    read = 2 * (shape.total_parameters - expert + touched * expert) + alive * context * _cache_bytes(shape)
    work = alive * shape.flops_per_token(context) / 3
    memory = read / rollouts.tp / (1e9 * hardware.memory_bandwidth_gbs * efficiency.memory)
    products = work / rollouts.tp / (efficiency.grouped_gemm * hardware.peak_flops(_precision(hardware)))
    reduction = hardware.nvlink_latency_us if rollouts.tp <= hardware.nvlink_domain else hardware.network_latency_us
    latency = shape.num_layers * (_LAYER_LATENCY_US + (2 * reduction if rollouts.tp > 1 else 0.0)) * 1e-6
    return memory + products + latency


def _precision(hardware: Hardware) -> str:
    return "bf16" if "bf16" in hardware.peak_tflops else "fp32"


def _cache_bytes(shape: ModelShape) -> float:
    """bf16 keys and values of one token."""
    return 2 * shape.num_layers * 2 * shape.key_width


def _exponential_scale(mean: float, longest: float) -> float:
    """Scale of an exponential distribution whose part below `longest`, with the rest at it, has this mean; inf for mean = longest."""
    if mean >= longest:
        return math.inf
    low, high = mean, 1e6 * longest
    for _ in range(100):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-longest / middle) < mean:
            low = middle
        else:
            high = middle
    return middle
