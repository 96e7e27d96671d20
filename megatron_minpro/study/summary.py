"""What a study's rows say: a line for every group of cells that differ in the seed alone, and its comparison with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_minpro.report.statistics import Difference, Interval, holm, mean_interval, paired_difference
from megatron_minpro.study.cells import combinations, group_name, named_axes
from megatron_minpro.study.definition import Study, level_name
from megatron_minpro.study.rows import Row

# Measures that are compared with the reference.
COMPARED = ("pass_at_1_after", "pass_at_8_after", "reward_last", "reward_area")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rows of one combination of levels, by seed."""

    name: str
    levels: Mapping[str, str]
    rows: Mapping[int, Row]  # those that ended well
    failed: int
    missing: int

    def values(self, measure: str) -> dict[int, float]:
        """Seed -> measure, of the rows that have it."""
        return {seed: row.measures[measure] for seed, row in self.rows.items() if measure in row.measures}

    def interval(self, measure: str) -> Interval | None:
        """Mean over seeds; None where no row has the measure."""
        values = self.values(measure)
        return mean_interval(list(values.values())) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One measure of a group against that of the reference group with the same other levels. holm: p corrected within that family."""

    group: Group
    reference: Group
    measure: str
    difference: Difference
    holm: float | None


def make_groups(study: Study, rows: Mapping[str, Row]) -> list[Group]:
    """All combinations of levels in the order of the study, also those without a row."""
    groups = []
    named = named_axes(study)
    for combination in combinations(study):
        levels = {axis: level.name for axis, level in combination.items()}
        name = group_name(levels, named)
        found = {seed: rows[f"{name}_seed{seed}"] for seed in study.seeds if f"{name}_seed{seed}" in rows}
        groups.append(
            Group(
                name=name,
                levels=levels,
                rows={seed: row for seed, row in found.items() if row.status == "ok"},
                failed=sum(row.status == "failed" for row in found.values()),
                missing=len(study.seeds) - len(found),
            )
        )
    return groups


def compare(study: Study, groups: Sequence[Group], measures: Sequence[str] = COMPARED) -> list[Comparison]:
    """Every group with its reference: the same levels but for the reference's axis. Holm's correction counts the groups of one family.

    Empty without a reference.
    """
    found: list[Comparison] = []
    for axis, level in study.reference.items():
        for family in families(study, groups).values():
            for reference in [group for group in family if group.levels[axis] == level_name(level)]:  # one, once it has a row
                for measure in measures:
                    found += _compare_family(family, reference, measure)
    return found


def _compare_family(family: Sequence[Group], reference: Group, measure: str) -> list[Comparison]:
    pairs = [
        (group, difference)
        for group in family
        if group is not reference and (difference := paired_difference(group.values(measure), reference.values(measure))) is not None
    ]
    corrected = holm({group.name: difference.p for group, difference in pairs if difference.p is not None})
    return [
        Comparison(group=group, reference=reference, measure=measure, difference=difference, holm=corrected.get(group.name))
        for group, difference in pairs
    ]


def main_axis(study: Study) -> str:
    """The axis whose levels are compared with each other: the reference's, or else the first."""
    return next(iter(study.reference or study.axes))


def families(study: Study, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Title -> groups that differ in the main axis alone; the title says their other levels."""
    axis = main_axis(study)
    found: dict[str, list[Group]] = {}
    for group in groups:
        title = ", ".join(f"{name} {level}" for name, level in group.levels.items() if name != axis)
        found.setdefault(title, []).append(group)
    return found
