"""RUN_DIR/metrics.jsonl: one line per global step. Every run writes it; the console, the plots and the summary read it.

Global steps count from 0. Step k samples batch k and trains batch k - staleness, so the first steps only sample and the last only train.
metrics_table.py says what every name means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_minpro.tracking.json_lines import JsonLines, line_number, read_json_lines

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends to metrics.jsonl. One writer at a time."""

    def __init__(self, run_dir: str | Path) -> None:
        """Continue the file of an earlier attempt, or begin one. Makes run_dir. A last line that a crash cut short is removed.

        Raises:
            ValueError: metrics.jsonl holds anything else than lines of this writer.
        """
        self.path = Path(run_dir) / METRICS_FILE
        self._file = JsonLines(self.path)
        steps = [step for step, _ in self._steps()]
        self._last_step = steps[-1] if steps else None

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write one line and flush it. The numbers are finite, or null.

        Raises:
            ValueError: the step does not follow the steps already written (see truncate_after).
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"{self.path}: step {step} follows step {self._last_step}; expected a later one")
        self._file.append({"global_step": step, **metrics})
        self._last_step = step

    def truncate_after(self, step: int) -> None:
        """Forget every later step (-1: all of them), so that a resumed run writes them anew."""
        kept = [(found, end) for found, end in self._steps() if found <= step]
        self._last_step, end = kept[-1] if kept else (None, 0)
        self._file.cut(end)

    def close(self) -> None:
        """Flush to the disk and close. Calling it again does nothing."""
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _steps(self) -> Iterator[tuple[int, int]]:
        """(global step, offset behind its line)."""
        for end, line in _lines(self.path):
            yield int(line["global_step"] or 0), end


def read_metrics(path: str | Path) -> Iterator[dict[str, float | None]]:
    """The complete lines of a metrics.jsonl, in order; nothing when the file does not exist.

    Raises:
        ValueError: a line is not a JSON object with a global_step. The message names file and line.
    """
    for _, line in _lines(Path(path)):
        yield line


def _lines(path: Path) -> Iterator[tuple[int, dict[str, float | None]]]:
    begin = 0
    for end, line in read_json_lines(path):
        if not isinstance(line.get("global_step"), int):
            raise ValueError(f"{path}:{line_number(path, begin)}: expected a JSON object with a whole number global_step")
        begin = end
        yield end, line
