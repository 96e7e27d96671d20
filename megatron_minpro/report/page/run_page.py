"""Everything the page shows of one run: texts for the template, numbers for the charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_minpro.report.page.along_response import AlongResponse, along_response
from megatron_minpro.report.page.charts.chart import Chart
from megatron_minpro.report.page.charts.off_policy_tab import off_policy_charts
from megatron_minpro.report.page.charts.run_tab import EVALUATIONS, run_charts, shown_ks
from megatron_minpro.report.page.columns import columns
from megatron_minpro.report.page.counts import Count, counts
from megatron_minpro.report.page.settings_table import Nearest, nearest_shipped, shown_settings
from megatron_minpro.report.page.time_shares import Role, time_shares
from megatron_minpro.report.page.token_data import token_data
from megatron_minpro.report.page.versions import VersionTable, version_table
from megatron_minpro.report.page.visible_text import visible
from megatron_minpro.report.runs import RunView

_POLICY_FOLDER = "policy"  # the exported model, with its tokenizer
_LAYOUT = ("tp", "pp", "cp", "ep", "etp", "dp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A line of a list."""

    label: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedChart:
    """A chart in its place, or why it is not there."""

    chart: Chart
    missing: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """One run. `data` goes to the page's scripts; the other fields to the template."""

    name: str
    path: str
    state: str
    facts: Sequence[Fact]
    notes: Sequence[str]
    token_notes: Sequence[str]
    nearest: Nearest | None
    settings: Sequence[tuple[str, str]]
    roles: Sequence[Role]
    counts: Sequence[Count]
    versions: VersionTable
    run_charts: Sequence[PlacedChart]
    off_policy_charts: Sequence[PlacedChart]
    along: AlongResponse | None  # None: no step has what these charts show
    data: Mapping[str, Any]


def run_page(view: RunView, *, shipped: Mapping[str, Mapping[str, Any]], numbers: int, token_characters: int) -> RunPage:
    """Read what the page needs beside the view: the token records.

    Args:
        view: the run.
        shipped: name -> settings of the shipped configurations.
        numbers: how many numbers of metrics the page takes of this run.
        token_characters: how much of it the token records may fill.
    """
    tokens = token_data(view.path, tokenizer_folders=_tokenizer_folders(view), budget=token_characters)
    curves = columns(view.metrics, numbers=numbers)
    ks = _ks(view)
    evaluations = _evaluation_rows(view, ks)
    along = along_response(view.metrics)
    notes = [visible(note) for note in view.notes]
    return RunPage(
        name=visible(view.name),
        path=visible(str(view.path)),
        state=view.state,
        facts=_facts(view),
        notes=[*notes, curves.note] if curves.note else notes,
        token_notes=[visible(note) for note in tokens.notes],
        nearest=nearest_shipped(view.settings, shipped),
        settings=shown_settings(view.settings),
        roles=time_shares(view.metrics),
        counts=counts(view.metrics, view.result),
        versions=version_table(view.attempts),
        run_charts=[_placed(chart, view.metrics, evaluations) for chart in run_charts(ks)],
        off_policy_charts=[_placed(chart, view.metrics, evaluations) for chart in off_policy_charts(view.metrics)],
        along=along,
        data={
            "columns": curves.values,
            "evaluations": evaluations,
            "tokens": tokens.content,
            "along": None if along is None else {"steps": along.steps, "charts": along.data},
        },
    )


def _placed(chart: Chart, metrics: Sequence[Mapping[str, float | None]], evaluations: Sequence[Any]) -> PlacedChart:
    if chart.needs == (EVALUATIONS,):
        return PlacedChart(chart=chart, missing=None if evaluations else "no held-out measurement is in this folder")
    missing = f"{' and '.join(chart.needs)}: not in this run's metrics" if chart.missing(metrics) else None
    return PlacedChart(chart=chart, missing=missing)


def _tokenizer_folders(view: RunView) -> list[Path]:
    model = view.settings.get("model.path")
    return [view.path / _POLICY_FOLDER, *([Path(model)] if isinstance(model, str) else [])]


def _ks(view: RunView) -> list[int]:
    names = dict.fromkeys(name for measured in view.evaluations.values() for name in measured if name.startswith("pass_at_"))
    return shown_ks([int(name.removeprefix("pass_at_")) for name in names])


def _evaluation_rows(view: RunView, ks: Sequence[int]) -> list[dict[str, Any]]:
    """{when, step, k, value} of each held-out measurement; `before` stands at step 0 and `after` behind the last one."""
    end = max((int(line["global_step"] or 0) for line in view.metrics), default=0) + 1
    return [
        {"when": when, "step": _step_of(when, end), "k": f"pass@{k}", "value": measured[f"pass_at_{k}"]}
        for when, measured in view.evaluations.items()
        for k in ks
        if f"pass_at_{k}" in measured
    ]


def _step_of(when: str, end: int) -> int:
    return {"before": 0, "after": end}[when] if when in ("before", "after") else int(when.removeprefix("step_"))


def _facts(view: RunView) -> list[Fact]:
    settings = view.settings
    known: list[tuple[str, Any]] = [
        ("objective", settings.get("objective.name")),
        ("staleness", settings.get("staleness")),
        ("steps", _steps(view)),
        ("model", settings.get("model.path")),
        ("responses per step", _responses(settings)),
        ("updates per step", settings.get("actor.updates_per_step")),
        ("layout", _layout(view)),
        ("seed", settings.get("seed")),
        ("wall time", _duration(view.seconds.get("total"))),
    ]
    return [Fact(label=label, value=visible(str(value), limit=200)) for label, value in known if value is not None]


def _steps(view: RunView) -> str | None:
    trained = sum(line.get("batch/lag_min") is not None for line in view.metrics)
    planned = view.settings.get("num_global_steps")
    return f"{trained} of {planned} trained" if planned is not None else f"{trained} trained"


def _responses(settings: Mapping[str, Any]) -> str | None:
    prompts, size = settings.get("rollout.prompts_per_step"), settings.get("rollout.group_size")
    return f"{prompts} prompts × {size}" if prompts is not None and size is not None else None


def _layout(view: RunView) -> str | None:
    settings = view.settings
    ranks, servers = settings.get("world_size"), settings.get("rollout.servers")
    if ranks is None:
        return None
    degrees = [(name, settings.get(f"parallel.{name}")) for name in _LAYOUT]
    spread = ", ".join(f"{name} {degree}" for name, degree in degrees if isinstance(degree, int) and degree > 1)
    said = f"{ranks} trainer {'rank' if ranks == 1 else 'ranks'}{f' ({spread})' if spread else ''}"
    return said if not servers else f"{said}, {servers} {'server' if servers == 1 else 'servers'}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s"
