"""RUN/report.html while the run goes: written anew after each checkpoint by a process of its own. Ranks and console do not wait for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_minpro.run.run_folder import LATEST_FILE
from rollout.processes import ManagedProcess, spawn


class PageAtCheckpoints:
    """Looks at checkpoints/latest. One page is written at a time; a checkpoint that comes meanwhile is seen when that one is done."""

    def __init__(self, run_dir: Path, *, start: Callable[[], ManagedProcess], announce: Callable[[str], None]) -> None:
        """A checkpoint that is there already needs no page.

        Args:
            run_dir: of the run.
            start: begins to write the page.
            announce: is told when a page could not be written.
        """
        self._latest = run_dir / "checkpoints" / LATEST_FILE
        self._start = start
        self._announce = announce
        self._shown = self._newest()
        self._writer: ManagedProcess | None = None

    def look(self) -> None:
        """Begin a page if there is a new checkpoint. Returns at once."""
        if self._writer is not None:
            if self._writer.is_running:
                return
            if self._writer.exit_code != 0:
                self._announce(f"no page was written: {self._writer.describe_end(num_lines=3)}")
            self._writer = None
        newest = self._newest()
        if newest != self._shown:
            self._shown = newest
            self._writer = self._start()

    def close(self) -> None:
        """End a page that is being written."""
        if self._writer is not None:
            self._writer.terminate()

    def _newest(self) -> str:
        return self._latest.read_text(encoding="utf-8").strip() if self._latest.exists() else ""


def start_page(run_dir: Path) -> ManagedProcess:
    """`minpro report RUN` with the lowest priority, its output in RUN/logs/report.log."""
    command = ["nice", "-n", "19", sys.executable, "-m", "megatron_minpro.cli", "report", str(run_dir)]
    return spawn(command, log_path=run_dir / "logs" / "report.log", env=os.environ, name="page")
