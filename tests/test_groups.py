"""Tests that share a cluster, a server or a finished run are run by one process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.conftest import GROUPS, group_of

ROOT = Path(__file__).resolve().parents[1]


def test_every_group_names_files_that_exist() -> None:
    assert [prefix for prefix, _ in GROUPS if not (ROOT / prefix).exists()] == []


def test_a_folder_is_one_group_and_any_other_file_is_its_own() -> None:
    assert group_of("tests/slurm/test_training_job.py::test_a[x::y]") == group_of("tests/slurm/test_scaling_job.py::test_b") == "slurm"
    assert group_of("tests/test_groups.py::test_a") == "tests/test_groups.py"


def test_the_longest_beginning_of_a_path_decides() -> None:
    assert group_of("tests/end_to_end/test_dapo.py::test_a") == "dapo"
    assert group_of("tests/end_to_end/test_main_job.py::test_a") == "end_to_end"


@pytest.mark.parametrize("number", range(8))
def test_all_tests_of_a_group_meet_in_one_process(number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    # The folder above the workers' own is the same for all of them: the first test that comes leaves its process there.
    base = tmp_path_factory.getbasetemp()
    note = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "process_of_the_group"
    with contextlib.suppress(FileExistsError), note.open("x") as file:
        file.write(str(os.getpid()))
    assert note.read_text() == str(os.getpid())
