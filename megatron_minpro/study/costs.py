"""How long a cell will take: measured on its own row or a like one, scaled from a smoke run, or planned for GPUs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_minpro.cluster import planning
from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.config import RunConfig
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.rows import Row
from parallel.planner.hardware import Hardware
from parallel.planner.plan import Plan, make_plan

Source = Literal["measured", "scaled from a smoke run", "planned", "not known: run --smoke"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one cell. seconds: None where nothing is known. gpus: of ranks and servers; 0 on a CPU."""

    seconds: float | None
    gpus: int
    source: Source

    @property
    def gpu_hours(self) -> float | None:
        """None where the seconds are not known."""
        return None if self.seconds is None else self.seconds * self.gpus / 3600


def cost_of(
    cell: Cell, rows: Mapping[str, Row], smoke_rows: Mapping[str, Row], *, machine: Hardware | None, mean_tokens: int | None
) -> Cost:
    """The best estimate there is.

    Args:
        cell: what is to be run.
        rows: of the study.
        smoke_rows: of its smoke runs. Their seconds per response are an upper bound: small batches are slow.
        machine: whose GPUs would run it; None: a CPU.
        mean_tokens: of a response, for the plan; None: as long as it may be.

    Raises:
        ValueError: the plan cannot be made.
    """
    config = cell.config
    gpus = 0 if machine is None else config.world_size + config.rollout.servers * config.rollout.tp
    done = [row for row in rows.values() if row.status == "ok"]
    for like in ([row for row in done if row.levels == cell.levels], done):
        if like:
            return Cost(seconds=statistics.fmean(row.measures["seconds"] for row in like), gpus=gpus, source="measured")
    if machine is not None:
        plan = plan_of(config, machine, mean_tokens=mean_tokens)
        assert plan.global_step is not None
        return Cost(seconds=plan.global_step.step_s * config.num_global_steps, gpus=gpus, source="planned")
    short = [row for row in smoke_rows.values() if "step_s" in row.measures]
    if not short:
        return Cost(seconds=None, gpus=gpus, source="not known: run --smoke")
    like = [row for row in short if any(row.levels[axis] == level for axis, level in cell.levels.items())] or short
    return Cost(seconds=statistics.fmean(_scaled(row, config) for row in like), gpus=gpus, source="scaled from a smoke run")


def plan_of(config: RunConfig, machine: Hardware, *, mean_tokens: int | None) -> Plan:
    """Memory and time of the cell by the planner. Raises ValueError as `minpro plan`."""
    shape = planning.shape_of(config)
    work = planning.reinforcement_work(config, mean_tokens=mean_tokens, colocated=False)
    planning.check_length(shape, work)
    return make_plan(shape, config.layout, planning.training_of(config, machine, TrainingChoice()), machine, work)


def _scaled(row: Row, config: RunConfig) -> float:
    """A run as the smoke run was, with this run's steps and responses; what is no step, the start and the end, stays."""
    given, rollout = row.settings, config.rollout  # what the row does not name is the base configuration's
    step_s, steps = row.measures["step_s"], given.get("num_global_steps", config.num_global_steps)
    prompts = given.get("rollout.prompts_per_step", rollout.prompts_per_step)
    more = rollout.prompts_per_step * rollout.group_size / (prompts * given.get("rollout.group_size", rollout.group_size))
    return max(0.0, row.measures["seconds"] - step_s * steps) + step_s * more * config.num_global_steps
