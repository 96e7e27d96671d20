"""Runs beside each other: settings that differ, measures, groups of seeds, and differences from a reference, paired by seed.

Runs whose settings differ in the seed alone are one group, except a run whose seed the group has already: it begins another group, so that
two runs of the same settings (of two versions of the code, say) are compared and not averaged. Settings that change no number (places, the
schedule, the layout) make no group.

A difference needs the same seed on both sides: cells with one seed see the same prompts in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_minpro.config import changes_numbers
from megatron_minpro.report.measures import run_measures
from megatron_minpro.report.runs import RunView
from megatron_minpro.report.statistics import Difference, Interval, mean_interval, paired_difference

_HIDDEN = ("name", "output_dir")  # the runs' labels say them


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run. label: its name, or its path where two have the same name."""

    label: str
    view: RunView
    measures: Mapping[str, float]  # of measures.py; none where no batch was trained


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGroup:
    """Runs whose settings differ in the seed alone, in the order given. A run whose seed is not known is alone, under seed -1."""

    name: str
    runs: Mapping[int, ComparedRun]  # seed -> run

    def values(self, measure: str) -> dict[int, float]:
        """Seed -> measure, of the runs that have it."""
        return {seed: run.measures[measure] for seed, run in self.runs.items() if measure in run.measures}

    def interval(self, measure: str) -> Interval | None:
        """Mean over seeds with its 95 % t interval; None where no run has the measure."""
        values = self.values(measure)
        return mean_interval(list(values.values())) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDifference:
    """A group minus the reference's group, over the seeds that both have."""

    group: SeedGroup
    measure: str
    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` finds."""

    runs: Sequence[ComparedRun]
    differing: Mapping[str, Sequence[Any]]  # dotted key of a setting -> its value in each run; None where a run has no such setting
    groups: Sequence[SeedGroup]
    reference: SeedGroup
    differences: Sequence[GroupDifference]
    notes: Sequence[str]  # one line each: what is missing, of which run

    @property
    def measures(self) -> list[str]:
        """All measures that some run has."""
        return list(dict.fromkeys(name for run in self.runs for name in run.measures))


def compare(views: Sequence[RunView], reference: RunView | None = None) -> Comparison:
    """Lay runs beside each other.

    Args:
        views: the runs, at least one.
        reference: one of them; its group is what the others are compared with. None: the first.

    Raises:
        ValueError: no run is given, or the same folder twice.
    """
    if not views:
        raise ValueError("compare: expected at least one run")
    paths = [view.path.resolve() for view in views]
    if repeated := next((view for view, path in zip(views, paths, strict=True) if paths.count(path) > 1), None):
        raise ValueError(f"{repeated.path}: given twice; expected every run once")
    runs = [ComparedRun(label=label, view=view, measures=_measures(view)) for label, view in zip(_labels(views), views, strict=True)]
    groups = _groups(runs)
    chosen = views[0] if reference is None else reference
    reference_group = next(group for group in groups if any(run.view is chosen for run in group.runs.values()))
    differences = [
        GroupDifference(group=group, measure=measure, difference=difference)
        for group in groups
        if group is not reference_group
        for measure in dict.fromkeys(name for run in group.runs.values() for name in run.measures)
        if (difference := paired_difference(group.values(measure), reference_group.values(measure))) is not None
    ]
    return Comparison(
        runs=runs,
        differing=_differing(views),
        groups=groups,
        reference=reference_group,
        differences=differences,
        notes=[*_notes(runs), *_unpaired(groups, reference_group)],
    )


def _measures(view: RunView) -> dict[str, float]:
    try:
        return run_measures(view.metrics, view.evaluations, view.seconds)
    except ValueError:  # no batch was trained: `_notes` say so
        return {}


def _labels(views: Sequence[RunView]) -> list[str]:
    names = [view.name for view in views]
    return [view.name if names.count(view.name) == 1 else str(view.path) for view in views]


def _differing(views: Sequence[RunView]) -> dict[str, list[Any]]:
    known = [view for view in views if view.settings]  # of the others nothing is known
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for view in known for key in view.settings):
        values = [view.settings.get(key) for view in views]
        if key not in _HIDDEN and any(view.settings.get(key) != known[0].settings.get(key) for view in known):
            found[key] = values
    return found


def _groups(runs: Sequence[ComparedRun]) -> list[SeedGroup]:
    members: list[tuple[dict[str, Any], dict[int, ComparedRun]]] = []  # (settings without the seed, seed -> run)
    for run in runs:
        settings = {key: value for key, value in run.view.settings.items() if changes_numbers(key) and key != "seed"}
        seed = run.view.seed
        if seed is None:
            members.append(({}, {-1: run}))
            continue
        group = next((found for same, found in members if same == settings and seed not in found and -1 not in found), None)
        if group is None:
            members.append((settings, {seed: run}))
        else:
            group[seed] = run
    names = [_group_name(list(found.values())) for _, found in members]
    numbered = [f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name for index, name in enumerate(names)]
    return [SeedGroup(name=name, runs=found) for name, (_, found) in zip(numbered, members, strict=True)]


def _group_name(runs: Sequence[ComparedRun]) -> str:
    """What the labels have in common but for the seed: grpo_seed1, grpo_seed2 -> grpo; else the first label and how many there are."""
    if len(runs) == 1:
        return runs[0].label
    stems = {re.sub(rf"[._-]?(seed|s)?[._-]?{run.view.seed}$", "", run.label) for run in runs}
    return stems.pop() or runs[0].label if len(stems) == 1 else f"{runs[0].label} and {len(runs) - 1} more"


def _notes(runs: Sequence[ComparedRun]) -> list[str]:
    found = []
    for run in runs:
        if run.view.state != "complete":
            found.append(f"{run.label}: {run.view.state}, after {len(run.view.metrics)} global steps")
        if run.view.metrics and not run.measures:
            found.append(f"{run.label}: no batch was trained")
        found += [f"{run.label}: {note}" for note in run.view.notes]
    return found


def _unpaired(groups: Sequence[SeedGroup], reference: SeedGroup) -> list[str]:
    alone = [group for group in groups if not group.runs.keys() & reference.runs.keys()]
    return [f"{group.name}: no seed in common with {reference.name}, so no difference" for group in alone]
