"""Seconds of one layer's, and one step's, communication on one GPU. Rank order is ParallelLayout's: tp, cp, dp, pp; etp, ep, edp."""

from __future__ import annotations

from parallel.layout import ParallelLayout
from parallel.planner.compute import Machine
from parallel.planner.shape import ModelShape
from parallel.planner.stages import StageParameters
from parallel.planner.training import Batch, Training

_US = 1e-6


def dispatch_seconds(shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training) -> float:
    """One pass of the tokens to their experts, or back. Balanced routing, every expert equally likely.

    alltoall sends a token once per chosen expert. The deduplicating dispatchers send it once to every node that holds a chosen expert
    and spread it there over NVLink. Network and NVLink work at the same time.
    """
    group = layout.ep * layout.etp
    if not shape.is_moe or group == 1:
        return 0.0
    hardware, efficiency = machine.hardware, machine.efficiency
    t = batch.micro_batch_tokens / layout.cp
    own = (t / layout.tp if layout.sequence_parallel else t) * layout.etp
    token = shape.hidden_size * training.element_bytes
    nodes = max(1.0, group / hardware.nvlink_domain)
    on_node = group / nodes
    k = shape.top_k
    if training.dispatcher == "alltoall":
        remote = k * (1 - 1 / nodes)
        near = k / nodes * (1 - 1 / on_node)
    else:
        remote = (nodes - 1) * (1 - (1 - 1 / nodes) ** k)
        near = nodes * on_node * (1 - (1 - 1 / group) ** k) * (1 - 1 / on_node)
    network = own * remote * token * training.imbalance / (1e9 * hardware.network_gbs * efficiency.network)
    nvlink = own * near * token * training.imbalance / (1e9 * hardware.nvlink_gbs * efficiency.nvlink_dispatch)
    latency = hardware.network_latency_us if nodes > 1 else hardware.nvlink_latency_us
    return max(network, nvlink) + latency * _US


def hidden_part(machine: Machine, training: Training) -> float:
    """Part of dispatch and combine that another micro-batch's computation hides."""
    if not training.overlap:
        return 0.0
    efficiency = machine.efficiency
    return {
        "alltoall": efficiency.hidden_alltoall,
        "deepep": efficiency.hidden_deepep,
        "hybridep": efficiency.hidden_hybridep,
    }[training.dispatcher]


def collective_seconds(machine: Machine, bytes_per_rank: float, ranks: int, *, spread: int) -> float:
    """All-gather or reduce-scatter in which each of `ranks` ranks ends or starts with bytes_per_rank in all.

    spread: distance from the first to one past the last rank; beyond the NVLink domain the network is what counts.
    """
    if ranks == 1:
        return 0.0
    hardware = machine.hardware
    inside = spread <= hardware.nvlink_domain
    rate = hardware.nvlink_gbs if inside else hardware.network_gbs * machine.efficiency.network
    if not inside and spread > 0:
        # Ring over nodes: all ranks of the group that share a node share its ports.
        rate *= max(1.0, min(ranks, ranks * hardware.nvlink_domain / spread))
        rate = min(rate, hardware.nvlink_gbs)
    latency = hardware.nvlink_latency_us if inside else hardware.network_latency_us
    return bytes_per_rank * (ranks - 1) / ranks / (1e9 * rate) + latency * _US


def tensor_parallel_seconds(
    shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training, *, is_moe: bool
) -> tuple[float, float]:
    """Forward and backward: gather before and scatter after each block that tensor parallelism splits, once more for weight gradients."""
    blocks = 1 if is_moe and not shape.shared_ffn else 2
    activation = batch.micro_batch_tokens / layout.cp * shape.hidden_size * training.element_bytes
    once = collective_seconds(machine, activation, layout.tp, spread=layout.tp)
    return 2 * blocks * once, 3 * blocks * once


def context_parallel_seconds(
    shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training
) -> tuple[float, float]:
    """Forward and backward: keys and values of all ranks pass every rank; gradients too on the way back."""
    whole = batch.micro_batch_tokens * 2 * shape.key_width / layout.tp * training.element_bytes
    once = collective_seconds(machine, whole, layout.cp, spread=layout.tp * layout.cp)
    return once, 2 * once


def pipeline_seconds(shape: ModelShape, layout: ParallelLayout, machine: Machine, batch: Batch, training: Training) -> float:
    """Activations and gradients of one micro-batch to the neighbouring stages, over all virtual stages; half hidden when interleaved."""
    if layout.pp == 1:
        return 0.0
    hardware = machine.hardware
    inside = layout.world_size <= hardware.nvlink_domain
    rate = hardware.nvlink_gbs if inside else hardware.network_gbs * machine.efficiency.network
    size = batch.micro_batch_tokens / layout.cp * shape.hidden_size * training.element_bytes / layout.tp
    exposed = 1.0 if layout.vpp is None else 0.5 * layout.vpp
    return exposed * 2 * size / (1e9 * rate)


def data_parallel_seconds(held: StageParameters, layout: ParallelLayout, machine: Machine, training: Training) -> float:
    """Gradients reduced to their shards and parameters gathered again, dense and expert, once a step."""
    in_stage = layout.world_size // layout.pp
    size = training.gradient_bytes + training.element_bytes
    dense = collective_seconds(machine, held.dense_buffer * size, layout.dp * layout.cp, spread=in_stage)
    expert = collective_seconds(machine, held.expert_buffer * size, layout.edp, spread=in_stage)
    return dense + expert


def sharded_parameters_seconds(held: StageParameters, layout: ParallelLayout, machine: Machine, training: Training) -> float:
    """Fully sharded parameters: gathered for forward and for backward and gradients scattered, every micro-batch."""
    in_stage = layout.world_size // layout.pp
    size = 2 * training.element_bytes + training.gradient_bytes
    dense = collective_seconds(machine, held.dense_buffer * size, layout.dp * layout.cp, spread=in_stage)
    return dense + collective_seconds(machine, held.expert_buffer * size, layout.edp, spread=in_stage)
