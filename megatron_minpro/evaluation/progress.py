"""How far an evaluation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY_S = 10.0


class EvaluationProgress:
    """Counts responses and grades. Writes to stderr, so that stdout holds results alone."""

    def __init__(self, *, total: int, kept: int, graded: int) -> None:
        """total: responses wanted. kept, graded: what an earlier attempt left."""
        self._total, self._sampled, self._graded, self._tokens = total, kept, graded, 0
        self._kept, self._started, self._said = kept, time.monotonic(), time.monotonic()
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=Console(file=sys.stderr, highlight=False),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("responses", total=total, completed=kept, detail="")

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def sampled(self, num_tokens: int) -> None:
        """One more response."""
        with self._lock:
            self._sampled += 1
            self._tokens += num_tokens
        self._show()

    def graded(self, graded: int) -> None:
        """Grades so far. May be called from another thread."""
        self._graded = graded
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        seconds = max(now - self._started, 1e-6)
        detail = f"{self._tokens / seconds:,.0f} tokens/s, {self._graded:,} graded"
        self._bar.update(self._task, completed=self._sampled, detail=detail)
        with self._lock:
            if not self._bar.disable or now - self._said < _EVERY_S:
                return
            self._said = now
        new = self._sampled - self._kept
        left = f", {(self._total - self._sampled) * seconds / new:,.0f} s left" if new else ""
        print(f"{self._sampled:,} of {self._total:,} responses, {detail}{left}", file=sys.stderr, flush=True)
