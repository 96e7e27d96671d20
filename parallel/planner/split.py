"""How many of the GPUs should train and how many sample: the split that makes a global step shortest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from parallel.planner.plan import Plan, make_plan

_NODE = 8  # GPUs that change sides together


def splits(plan: Plan) -> list[Plan]:
    """Plans of the same GPUs with other shares of whole nodes for training, fastest global step first; only what fits.

    The trainer keeps its layout and gets more or fewer replicas; the servers keep their size. Empty outside reinforcement learning, and
    where trainer and servers share GPUs or fill less than two nodes.
    """
    rollouts, layout = plan.work.rollouts, plan.layout
    if rollouts is None or plan.work.colocated:
        return []
    total = layout.world_size + rollouts.servers * rollouts.tp
    found = []
    for trainers in range(_NODE, total, _NODE):
        servers, rest = divmod(total - trainers, rollouts.tp)
        if rest:
            continue
        try:
            other = replace(layout, world_size=trainers)
        except ValueError:  # the layout needs another multiple
            continue
        if plan.work.sequences % other.dp:
            continue
        changed = make_plan(
            plan.shape, other, plan.training, plan.hardware, replace(plan.work, rollouts=replace(rollouts, servers=servers))
        )
        if changed.fits:
            found.append(changed)
    return sorted(found, key=_step_s)


def as_json(found: Sequence[Plan]) -> list[dict[str, Any]]:
    """For programs: who gets how many, the seconds of a global step, and who is idle."""
    rows = []
    for plan in found:
        step, rollouts = plan.global_step, plan.work.rollouts
        assert step is not None
        assert rollouts is not None
        rows.append(
            {
                "world_size": plan.layout.world_size,
                "servers": rollouts.servers,
                "step_s": step.step_s,
                "trainer_idle": step.trainer_idle(step.schedule),
                "servers_idle": step.servers_idle(step.schedule),
            }
        )
    return rows


def _step_s(plan: Plan) -> float:
    assert plan.global_step is not None
    return plan.global_step.step_s
