"""What `minpro study --dry-run` shows: every combination, whether it is done, and what it would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_minpro.evaluation.tables import markdown_table
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.costs import cost_of
from megatron_minpro.study.durations import duration
from megatron_minpro.study.rows import Row
from parallel.planner.hardware import Hardware


def describe(
    cells: Sequence[Cell],
    rows: Mapping[str, Row],
    smoke_rows: Mapping[str, Row],
    *,
    machine: Hardware | None,
    mean_tokens: int | None,
    not_checked: Sequence[str],
) -> str:
    """A line for the cells that differ in the seed alone, and the totals.

    Args:
        cells: of the study.
        rows: cell -> row.
        smoke_rows: of its smoke runs.
        machine: whose GPUs would run it; None: a CPU.
        mean_tokens: of a response, for the plan.
        not_checked: what could not be looked at here.

    Raises:
        ValueError: as `costs.cost_of`.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.levels.values()), []).append(cell)
    lines: list[list[str]] = []
    left_s, left_gpu_hours, known = 0.0, 0.0, True
    for levels, members in groups.items():
        cost = cost_of(members[0], rows, smoke_rows, machine=machine, mean_tokens=mean_tokens)
        missing = sum(member.name not in rows for member in members)
        known = known and (cost.seconds is not None or not missing)
        left_s += missing * (cost.seconds or 0.0)
        left_gpu_hours += missing * (cost.gpu_hours or 0.0)
        said = "-" if cost.seconds is None else duration(cost.seconds)
        hours = [] if machine is None else ["-" if cost.gpu_hours is None else f"{cost.gpu_hours:,.0f}"]
        lines.append([*levels, str(len(members)), str(missing), said, *hours, cost.source])
    axes = list(cells[0].levels)
    header = [*axes, "seeds", "to run", "time of a cell", *([] if machine is None else [f"GPU hours ({machine.name})"]), "source"]
    total = f"{len(cells)} cells, {sum(cell.name not in rows for cell in cells)} to run"
    if known:
        total += f": {duration(left_s)} one after the other"
        total += "" if machine is None else f", {left_gpu_hours:,.0f} GPU hours"
    if machine is not None and mean_tokens is None:
        total += ". The plan takes every response to be as long as it may be; --mean-tokens changes that"
    return "\n".join([markdown_table(header, lines), total, *(f"not checked: {line}" for line in not_checked)])
