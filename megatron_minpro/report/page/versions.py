"""The table of versions: what the attempts of a run ran with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_minpro.report.page.visible_text import visible
from megatron_minpro.tracking.versions import AttemptVersions, installed_versions

_ABSENT = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """One program or part of the machine. differs: not the same in all columns."""

    name: str
    cells: tuple[str, ...]
    differs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTable:
    """Attempts one after the other that ran with the same share a column."""

    columns: tuple[str, ...]  # where each began; empty where there is one column
    rows: tuple[VersionRow, ...]
    known: bool  # False: these are of the environment that writes the page
    note: str


def version_table(attempts: Sequence[AttemptVersions]) -> VersionTable:
    """attempts: of the run, in order; none where its folder does not say."""
    if not attempts:
        return VersionTable(columns=(), rows=_rows([installed_versions()]), known=False, note="Of the environment that wrote this page.")
    same = [list(group) for _, group in groupby(attempts, key=lambda attempt: attempt.versions)]
    rows = _rows([dict(group[0].versions) for group in same])
    columns = tuple(f"from step {group[0].global_step}" for group in same) if len(same) > 1 else ()
    return VersionTable(columns=columns, rows=rows, known=True, note=_note(attempts, [row.name for row in rows if row.differs]))


def _note(attempts: Sequence[AttemptVersions], differing: Sequence[str]) -> str:
    if differing:
        note = f"{len(attempts)} attempts, which differ in {', '.join(differing)}."
    else:
        note = "Of the one attempt." if len(attempts) == 1 else f"The same in all {len(attempts)} attempts."
    first = attempts[0].global_step
    return f"{note} What trained before step {first} is not known." if first else note


def _rows(columns: Sequence[dict[str, str]]) -> tuple[VersionRow, ...]:
    names = dict.fromkeys(name for column in columns for name in column)
    cells = {name: tuple(visible(column.get(name, _ABSENT), limit=200) for column in columns) for name in names}
    return tuple(VersionRow(name=visible(name, limit=80), cells=row, differs=len(set(row)) > 1) for name, row in cells.items())
