from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.run.page_at_checkpoints import PageAtCheckpoints


class Writer:
    """A process that ends when it is told to."""

    exit_code: int | None = None
    terminated = False

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def describe_end(self, *, num_lines: int) -> str:
        return f"page ended with exit code {self.exit_code}"

    def terminate(self) -> None:
        self.terminated = True


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "latest"


def watched(latest: Path) -> tuple[PageAtCheckpoints, list[Any], list[str]]:
    writers: list[Any] = []
    said: list[str] = []

    def start() -> Any:
        writers.append(Writer())
        return writers[-1]

    return PageAtCheckpoints(latest.parents[1], start=start, announce=said.append), writers, said


def test_each_checkpoint_gets_a_page_and_one_is_written_at_a_time(latest: Path) -> None:
    pages, writers, said = watched(latest)
    pages.look()
    assert writers == []
    latest.write_text("step_000002")
    pages.look()
    latest.write_text("step_000004")
    pages.look()
    assert len(writers) == 1  # the first page is still being written
    writers[0].exit_code = 0
    pages.look()
    pages.look()
    assert len(writers) == 2 and said == []
    pages.close()
    assert writers[1].terminated


def test_a_checkpoint_of_an_earlier_attempt_needs_no_page(latest: Path) -> None:
    latest.write_text("step_000002")
    pages, writers, _ = watched(latest)
    pages.look()
    assert writers == []


def test_a_page_that_could_not_be_written_is_said_once(latest: Path) -> None:
    pages, writers, said = watched(latest)
    latest.write_text("step_000002")
    pages.look()
    writers[0].exit_code = 2
    pages.look()
    pages.look()
    assert said == ["no page was written: page ended with exit code 2"]
    assert len(writers) == 1
