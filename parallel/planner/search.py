"""Every legal layout of a number of GPUs, planned; those that fit, fastest first; the front of memory against throughput."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from parallel.layout import ParallelLayout
from parallel.planner.hardware import Hardware
from parallel.planner.plan import Plan, Work, make_plan
from parallel.planner.shape import ModelShape
from parallel.planner.stages import check_layout
from parallel.planner.training import Training
from parallel.stages import COUNTED, Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """fitting: fastest first. failing: least missing first."""

    fitting: tuple[Plan, ...]
    failing: tuple[Plan, ...]


def legal_layouts(shape: ModelShape, world_size: int, hardware: Hardware) -> Iterator[ParallelLayout]:
    """Layouts that the actor trains: tensor parallelism within NVLink, up to four virtual stages (more of them win little)."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    expert_sizes = divisors if shape.is_moe else [1]
    pipelines = {pp: list(_pipelines(shape.num_layers, pp)) for pp in divisors}
    for tp in divisors:
        if tp > hardware.nvlink_domain:
            continue
        for pp in divisors:
            for cp in divisors:
                if world_size % (tp * pp * cp):
                    continue
                for ep in expert_sizes:
                    if world_size % (ep * pp):
                        continue
                    for pipeline in pipelines[pp]:
                        layout = ParallelLayout(world_size=world_size, tp=tp, cp=cp, ep=ep, sequence_parallel=tp > 1, **asdict(pipeline))
                        if _is_legal(shape, layout):
                            yield layout


def _pipelines(num_layers: int, pp: int) -> Iterator[Pipeline]:
    """Without and with virtual stages: even ones, or else the first way to make them even with embedding and loss as layers."""
    for vpp in (None, 2, 3, 4) if pp > 1 else (None,):
        for settings in ({}, *COUNTED):
            pipeline = Pipeline(pp=pp, vpp=vpp, **settings)
            if pipeline.fits(num_layers):
                yield pipeline
                break


def _is_legal(shape: ModelShape, layout: ParallelLayout) -> bool:
    try:
        check_layout(shape, layout)
    except ValueError:
        return False
    return True


def search(
    shape: ModelShape,
    world_size: int,
    training: Training,
    hardware: Hardware,
    work: Work,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> Search:
    """Plan every legal layout that leaves each replica a sequence. progress(how many are done).

    Raises ValueError when no layout is legal.
    """
    plans = []
    for layout in legal_layouts(shape, world_size, hardware):
        if layout.dp > work.sequences:
            continue
        plans.append(make_plan(shape, layout, training, hardware, work))
        progress(len(plans))
    if not plans:
        raise ValueError(f"world_size: no layout of {world_size} GPUs is legal for {shape.name} with {work.sequences} sequences a step")
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: (-plan.time.tokens_per_s_per_gpu, plan.fullest.total))
    failing = sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.missing_bytes)
    return Search(fitting=tuple(fitting), failing=tuple(failing))


def pareto_front(plans: Sequence[Plan]) -> list[Plan]:
    """Plans that no other beats in both memory and throughput, least memory first."""
    front: list[Plan] = []
    fastest = 0.0
    for plan in sorted(plans, key=lambda plan: (plan.fullest.total, -plan.time.tokens_per_s_per_gpu)):
        if plan.time.tokens_per_s_per_gpu > fastest:
            front.append(plan)
            fastest = plan.time.tokens_per_s_per_gpu
    return front
