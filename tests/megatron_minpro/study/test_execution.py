"""What `minpro study` shows on a terminal while cells run."""

from __future__ import annotations

import io

import pytest

from megatron_minpro.study.cells import Cell
from megatron_minpro.study.execution import _View


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_of_cells_under_way_fits_the_terminal_in_whole_words(cells: dict[str, Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    view = _View(total=len(cells))
    view.one_more()
    running = list(cells.values())[:5]
    view.show(running)
    line = terminal.getvalue().removeprefix("\r\x1b[K")
    assert line.startswith(f"[{'#' * 1}{'.' * 23}] 1 of 18: {running[0].name}: starting; ")
    assert len(line) < 80 and line.endswith((" starting; ...", ": ...", " starting ..."))
