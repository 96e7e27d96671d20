"""What `minpro rehearse` shows and writes: tables, the verdict beside the plan's figure, pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.cluster.rehearsing import Verdict
from parallel.planner.memory import GB
from parallel.planner.view import layout_text
from parallel.rehearsal.tables import NOT_MODELLED, Table, all_tables


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """For programs. All bytes of device memory."""
    return {
        "fits": all(verdict.fits for verdict in verdicts),
        "ranks": [
            {"limit_bytes": verdict.limit_bytes, "planned_bytes": verdict.planned_bytes, **verdict.result.as_json()} for verdict in verdicts
        ],
    }


def describe(verdicts: Sequence[Verdict]) -> RenderableType:
    """For a terminal."""
    parts: list[RenderableType] = []
    for verdict in verdicts:
        parts.append(Text(_title(verdict), style="bold"))
        parts += [_drawn(table) for table in all_tables(verdict.result)]
        parts += [Text(line) for line in _lines(verdict)]
        parts.append(Text(_fit(verdict), style="green" if verdict.fits else "bold red"))
        parts.append(Text())
    parts.append(Text("not modelled: " + "; ".join(NOT_MODELLED), style="dim"))
    return Group(*parts)


def write(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """report.md, rehearsal.json and rank_N.png into the folder."""
    from parallel.rehearsal.plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "rehearsal.json", json.dumps(as_json(verdicts)) + "\n")
    text = ["# Rehearsal"]
    for verdict in verdicts:
        picture = f"rank_{verdict.result.request.rank}.png"
        plot(verdict.result, folder / picture, limit_bytes=verdict.limit_bytes)
        text += [f"## {_title(verdict)}", _fit(verdict), f"![memory]({picture})"]
        text += [table.markdown() for table in all_tables(verdict.result)]
        text += _lines(verdict)
    text.append("Not modelled:\n\n" + "\n".join(f"- {each}" for each in NOT_MODELLED))
    write_atomically(folder / "report.md", "\n\n".join(text) + "\n")


def _title(verdict: Verdict) -> str:
    result = verdict.result
    request = result.request
    return (
        f"{request.model_name}, {request.model['num_hidden_layers']} layers, {layout_text(request.layout)}, rank {request.rank}, "
        f"{request.dtype}, recompute {request.recompute}, {result.micro_batches} micro-batch{'' if result.micro_batches == 1 else 'es'} "
        f"of up to {result.micro_batch_tokens:,} tokens on this rank"
    )


def _fit(verdict: Verdict) -> str:
    phase = verdict.result.fullest
    return (
        f"{'fits' if verdict.fits else 'does not fit'}: {phase.peak / GB:.2f} GB ({phase.name}) of {verdict.limit_bytes / GB:.1f} GB; "
        f"the plan says {verdict.planned_bytes / GB:.2f} GB ({verdict.plan_error:+.1%})"
    )


def _lines(verdict: Verdict) -> list[str]:
    result = verdict.result
    seconds = sum(phase.seconds for phase in result.phases)
    lines = [
        f"layers: {result.layers}",
        f"rehearsed on torch {result.torch_version} in {seconds:.0f} s of one core with {result.host_bytes / GB:.1f} GB of host memory",
    ]
    guesses = sum(each.count for phase in result.phases for each in phase.guesses)
    if guesses:
        lines.append(f"guessed: {guesses} numbers that the program reads and that depend on weights (norms, losses, checks for NaN)")
    if result.fault is not None:
        lines.append(f"fault in {result.fault.phase}: {result.fault.kind}: {result.fault.message}")
    return lines


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.header):
        drawn.add_column(name, justify="left" if index < table.text_columns else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
