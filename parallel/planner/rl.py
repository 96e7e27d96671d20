"""Seconds of one global step of reinforcement learning: sampling, log-probabilities, updates, weight sync, and what staleness hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallel.planner.efficiency import DEFAULT, Efficiency
from parallel.planner.hardware import Hardware
from parallel.planner.lengths import Lengths
from parallel.planner.shape import ModelShape

# A layer's time in a decoding step beside reading memory and products: kernels that start one after the other. Judged from single
# responses, about 170 tokens/s of Qwen3-30B-A3B on an H100, not fitted; two small all-reduces come on top.
_LAYER_LATENCY_US = 90.0
_WEIGHT_SYNC_GBS = 10.0  # one sender, gathering as it goes: 30B bf16 in 5 to 10 s in every published figure
_COLOCATED_CACHE_SHARE = 0.2  # of a GPU that the trainer uses too
_CACHE_SHARE = 0.85  # of the memory beside the weights that the server gives to keys and values


# serial: one thing after the other. overlapped: a batch is sampled while another is trained; the next begins when both are done.
# rolling: the next batch fills the servers while the last responses finish, as systems do that give up a fixed lag.
Schedule = Literal["serial", "overlapped", "rolling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """What is sampled in a global step, and by what."""

    sequences: int
    prompt_tokens: float
    lengths: Lengths  # of responses
    servers: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalStep:
    """Seconds of the phases of one global step, and of the step by schedule.

    sampling_s: one batch alone. steady_sampling_s: with `staleness` batches under way, as far as the servers' memory lets them.
    """

    sampling_s: float
    steady_sampling_s: float
    logprobs_s: float
    updates_s: float
    sync_s: float
    staleness: int
    schedule: Schedule

    @property
    def step_s(self) -> float:
        """By the step's own schedule."""
        return self.seconds(self.schedule)

    def seconds(self, schedule: Schedule) -> float:
        """One global step by a schedule."""
        training = self.logprobs_s + self.updates_s
        if schedule == "serial":
            return self._sampling_s(schedule) + training + self.sync_s
        return max(self._sampling_s(schedule), training) + self.sync_s

    def trainer_idle(self, schedule: Schedule) -> float:
        """Share of the step in which the trainer has nothing to do."""
        return 1 - (self.logprobs_s + self.updates_s + self.sync_s) / self.seconds(schedule)

    def servers_idle(self, schedule: Schedule) -> float:
        """Share of the step in which no server samples. That some finish before others is not in it."""
        return 1 - self._sampling_s(schedule) / self.seconds(schedule)

    def _sampling_s(self, schedule: Schedule) -> float:
        return self.steady_sampling_s if schedule == "rolling" else self.sampling_s


def sync_seconds(shape: ModelShape) -> float:
    """bf16 weights of the whole model from the trainer to the servers."""
    return 2 * shape.total_parameters / (1e9 * _WEIGHT_SYNC_GBS)


def server_bytes(shape: ModelShape, hardware: Hardware, rollouts: Rollouts) -> float:
    """Bytes of one server on a GPU it shares with the trainer: its part of the bf16 weights, and keys and values.

    What exceeds a fifth of the GPU waits its turn.
    """
    cache = rollouts.sequences / rollouts.servers * (rollouts.prompt_tokens + rollouts.lengths.under_way) * _cache_bytes(shape)
    return 2 * shape.total_parameters / rollouts.tp + min(cache / rollouts.tp, _COLOCATED_CACHE_SHARE * hardware.usable_bytes)


def sampling_seconds(
    shape: ModelShape, hardware: Hardware, rollouts: Rollouts, *, batches_under_way: int = 1, efficiency: Efficiency = DEFAULT
) -> float:
    """Seconds from one finished batch to the next, the servers sharing it evenly.

    One batch under way drains while its longest responses go on alone; of several, the next ones fill the servers meanwhile.
    Raises ValueError when the weights leave no memory for keys and values.
    """
    free = hardware.usable_bytes - 2 * shape.total_parameters / rollouts.tp
    if free <= 0:
        raise ValueError(
            f"rollout.tp: {rollouts.tp} GPUs of {hardware.name} hold {hardware.usable_bytes * rollouts.tp / 1e9:.0f} GB, "
            f"the weights are {2e-9 * shape.total_parameters:.0f} GB"
        )
    lengths = rollouts.lengths
    context = rollouts.prompt_tokens + lengths.under_way
    room = _CACHE_SHARE * free * rollouts.tp / (context * _cache_bytes(shape))
    mine = rollouts.sequences / rollouts.servers
    together = max(1.0, min(mine * batches_under_way, room))
    prefill = mine * rollouts.prompt_tokens * shape.flops_per_token(rollouts.prompt_tokens) / 3
    prefill /= rollouts.tp * efficiency.gemm * hardware.peak_flops(_precision(hardware))
    if batches_under_way > 1:
        return prefill + mine / together * lengths.mean * _decode_seconds(shape, hardware, rollouts, together, context, efficiency)
    draining, begin = 0.0, 0.0
    for done, end in enumerate(lengths.tokens):
        alive = max(1.0, together * (1 - done / len(lengths.tokens)))
        middle = rollouts.prompt_tokens + (begin + end) / 2
        draining += (end - begin) * _decode_seconds(shape, hardware, rollouts, alive, middle, efficiency)
        begin = end
    waiting = (mine / together - 1) * lengths.mean * _decode_seconds(shape, hardware, rollouts, together, context, efficiency)
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
