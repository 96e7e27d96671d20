from __future__ import annotations

import platform

from megatron_minpro.report.page.versions import VersionRow, version_table
from megatron_minpro.tracking.versions import AttemptVersions


def attempt(step: int, **versions: str) -> AttemptVersions:
    return AttemptVersions(began="2026-11-30 06:13:00", global_step=step, versions=versions)


def test_one_attempt_is_one_column() -> None:
    table = version_table([attempt(0, torch="1", cpu="x")])
    assert (table.columns, table.known, table.note) == ((), True, "Of the one attempt.")
    assert table.rows == (VersionRow(name="torch", cells=("1",), differs=False), VersionRow(name="cpu", cells=("x",), differs=False))


def test_attempts_that_agree_share_their_column() -> None:
    table = version_table([attempt(0, torch="1"), attempt(4, torch="1")])
    assert (table.columns, table.note) == ((), "The same in all 2 attempts.")


def test_attempts_that_differ_stand_beside_each_other() -> None:
    attempts = [attempt(0, torch="1", cpu="x"), attempt(4, torch="1", cpu="x"), attempt(6, torch="2", cpu="x", gpu="y\x1b")]
    table = version_table(attempts)
    assert table.columns == ("from step 0", "from step 6")
    assert [(row.name, row.cells, row.differs) for row in table.rows] == [
        ("torch", ("1", "2"), True),
        ("cpu", ("x", "x"), False),
        ("gpu", ("–", "y␛"), True),
    ]
    assert table.note == "3 attempts, which differ in torch, gpu."


def test_steps_before_the_first_line_are_not_claimed() -> None:
    assert version_table([attempt(6, torch="1")]).note == "Of the one attempt. What trained before step 6 is not known."


def test_a_folder_that_does_not_say_shows_the_environment_of_the_page() -> None:
    table = version_table([])
    assert not table.known and table.note == "Of the environment that wrote this page."
    assert table.rows[0] == VersionRow(name="python", cells=(platform.python_version(),), differs=False)
