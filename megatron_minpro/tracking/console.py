"""The live view of a run: what goes on, a progress bar with time left, the latest numbers, where the time goes.

It reads files and touches nothing. On a terminal it repaints itself; anywhere else it prints one plain line per global step, with the time
of day. A narrow terminal gets more lines, never broken words.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_minpro.tracking.json_lines import read_json_lines
from megatron_minpro.tracking.metrics_file import METRICS_FILE
from megatron_minpro.tracking.metrics_table import HEADLINE
from megatron_minpro.tracking.progress import ENDED_PHASES, WAIT, Progress, read_progress

Metrics = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Column:
    """A number worth watching: the sum of some metrics."""

    label: str
    names: tuple[str, ...]  # of metrics
    format: str

    def text(self, line: Metrics) -> str:
        """The number as shown; a dash when the line has none."""
        values = [value for name in self.names if (value := line.get(name)) is not None]
        return format(sum(values), self.format) if values else "-"


COLUMNS = (
    Column("reward", (HEADLINE,), ".3f"),
    Column("prefix min", ("prefix_min/mean",), ".3f"),
    Column("clipped", ("clip/hard", "clip/soft"), ".2%"),
    Column("entropy", ("policy/entropy",), ".3f"),
    Column("tokens/s", ("throughput/tokens_per_second",), ",.0f"),
)
STEP_PHASES = ("sample", "reward", "score", "update", "sync")
_IDLE = (("trainer", f"time/{WAIT}"), ("servers", "time/idle_servers"))
_NUM_RECENT = 20  # steps that the time left is estimated from
_LONG_PHASE_S = 60.0  # from then on the place of the logs is shown
_BAR_WIDTH = 36

Ending = Literal["", "well", "failed"]  # "": the run goes on


class MetricsTail:
    """Follows a growing metrics.jsonl; a file that became shorter (a resumed run) is read anew."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path = Path(run_dir) / METRICS_FILE
        self._offset = 0

    def new_lines(self) -> list[dict[str, float | None]]:
        """Complete lines since the last call."""
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset = 0
        found = list(read_json_lines(self._path, start=self._offset))
        if found:
            self._offset = found[-1][0]
        return [line for _, line in found]


class Console:
    """Shows a run folder as it grows. Call refresh() every half second or so; log() for lines that stay."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        num_global_steps: int,
        name: str,
        resumed_from: int | None = None,
        alarms: Sequence[Callable[[Metrics], str | None]] = (),
        out: RichConsole | None = None,
    ) -> None:
        """
        Args:
            run_dir: the run folder.
            num_global_steps: batches to train.
            name: of the run.
            resumed_from: the last global step that an earlier attempt did and this one keeps. The lines that are there now are the
                earlier attempt's and are not printed again; those of later steps will be cut, and the steps done again.
            alarms: what to say of a line of metrics, None when all is well. Each speaks once.
            out: where to print; stdout by default.
        """
        self._run_dir = Path(run_dir)
        self._num_global_steps = num_global_steps
        self._name = name
        self._resumed_from = resumed_from
        self._out = RichConsole(file=sys.stdout, highlight=False) if out is None else out
        self._tail = MetricsTail(run_dir)
        self._latest: dict[str, float | None] = {}
        self._steps_done = 0
        self._step_seconds: list[float] = []
        self._activities: tuple[str, ...] = ()
        self._remark = ""
        self._alarms = list(alarms)
        self._started_at = time.monotonic()
        self._activity_since = self._started_at
        self._live: Live | None = None
        if resumed_from is not None:
            for line in self._tail.new_lines():
                if int(line["global_step"] or 0) <= resumed_from:
                    self._take(line)

    def __enter__(self) -> Console:
        if self._out.is_terminal:
            self._live = Live(self._render(None), console=self._out, auto_refresh=False, transient=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.refresh()
        if self._live is not None:
            progress = read_progress(self._run_dir)
            self._live.update(self._render(progress, ending="well" if kind is None else "failed"), refresh=True)
            self._live.stop()
            self._live = None

    def log(self, text: str) -> None:
        """Print a line that stays (above the bar)."""
        # A terminal breaks lines between words; a file or pipe gets the whole line.
        self._out.print(Text(text), soft_wrap=not self._out.is_terminal)

    def remark(self, text: str) -> None:
        """Show this beside what the run's files say, until the next remark; "" for nothing. Without a terminal it is a line."""
        if text != self._remark and text and self._live is None:
            self.log(f"{_now()}  {self._name}: {text}")
        self._remark = text

    def refresh(self) -> None:
        """Take in what the run wrote since the last call."""
        for line in self._tail.new_lines():
            self._take(line)
        progress = read_progress(self._run_dir)
        activities = () if progress is None else progress.activities
        if self._live is None:
            for activity in activities:
                if activity not in (*self._activities, *STEP_PHASES, WAIT):  # the phases of a step are in the step's line
                    self.log(f"{_now()}  {self._name}: {activity}")
        if activities != self._activities:
            self._activities, self._activity_since = activities, time.monotonic()
        if self._live is not None:
            self._live.update(self._render(progress), refresh=True)

    def _take(self, line: dict[str, float | None]) -> None:
        step = int(line["global_step"] or 0)
        # Steps that only sample (the first) or only train (the last) lack some numbers: keep showing the latest known ones.
        self._latest = {**self._latest, **line}
        self._steps_done = int(line.get("total/batches_trained") or 0)
        seconds = line.get("time/step")
        if seconds is not None:
            self._step_seconds = [*self._step_seconds[-(_NUM_RECENT - 1) :], seconds]
        if self._resumed_from is not None and step <= self._resumed_from:
            return
        if self._live is None:
            self.log(self._plain_line(step, line))
        for alarm in tuple(self._alarms):
            if (warning := alarm(line)) is not None:
                self.log(f"warning: global step {step}: {warning}")
                self._alarms.remove(alarm)

    def _plain_line(self, step: int, line: Metrics) -> str:
        parts = [_now(), f"step {step}", f"trained {self._steps_done}/{self._num_global_steps}"]
        parts += [f"{column.label} {column.text(line)}" for column in COLUMNS]
        parts.append(f"lag {_lag(line)}")
        parts += _phases(line)
        parts.append(f"{_clock(self._seconds_left())} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if not self._step_seconds:
            return None
        return (self._num_global_steps - self._steps_done) * sum(self._step_seconds) / len(self._step_seconds)

    def _render(self, progress: Progress | None, *, ending: Ending = "") -> Group:
        gone, left = _clock(time.monotonic() - self._started_at), _clock(self._seconds_left())
        head = Table.grid(padding=(0, 2))
        head.add_row(
            ProgressBar(total=self._num_global_steps, completed=self._steps_done, width=_BAR_WIDTH),
            Text(f"{self._steps_done}/{self._num_global_steps}", no_wrap=True),
            Text(f"in {gone}" if ending else f"{gone} gone, {left} left", style="cyan", no_wrap=True),
        )
        rows: list[Table | Text | Columns] = [Text.assemble((self._name, "bold"), ": ", (self._doing(progress, ending), "magenta")), head]
        silence_s = 0.0 if progress is None else time.time() - progress.updated_at
        if progress is not None and silence_s > _LONG_PHASE_S and not ending and progress.phase not in ENDED_PHASES:
            phase = f"{' and '.join(progress.activities)} {progress.detail}".strip()
            rows.append(Text(f"{phase} since {_clock(silence_s)}; logs are in {self._run_dir / 'logs'}", "yellow"))
        if self._latest:
            numbers = [(column.label, column.text(self._latest)) for column in COLUMNS] + [("lag", _lag(self._latest))]
            cells = [Text.assemble((f"{label}\n", "dim"), value, no_wrap=True) for label, value in numbers]
            rows.append(Columns(cells, padding=(0, 3)))
            phases = _phases(self._latest)
            if phases:
                rows.append(Text("  ".join(phases), style="dim"))
        return Group(*rows)

    def _doing(self, progress: Progress | None, ending: Ending) -> str:
        """What goes on and, outside the steps, for how long; or how the run ended."""
        doing = "starting" if progress is None else f"{' and '.join(progress.activities)} {progress.detail}".strip()
        if progress is not None and progress.phase in ENDED_PHASES:
            return doing
        if ending:
            return f"{doing}: done" if ending == "well" else f"ended while: {doing}"
        if progress is None or not set(progress.activities) & set(STEP_PHASES):
            doing = f"{doing}, {_clock(time.monotonic() - self._activity_since)}"
        return f"{doing}; {self._remark}" if self._remark else doing


def _now() -> str:
    return time.strftime("%F %T")


def _lag(line: Metrics) -> str:
    low, high = line.get("batch/lag_min"), line.get("batch/lag_max")
    return "-" if low is None or high is None else f"{low:.0f}-{high:.0f}"


def _phases(line: Metrics) -> list[str]:
    """Seconds of each phase, then the shares of the step in which trainer and servers are idle."""
    times = ((phase, line.get(f"time/{phase}")) for phase in STEP_PHASES)
    parts = [f"{phase} {seconds:.1f}s" for phase, seconds in times if seconds is not None]
    step, idle = line.get("time/step"), [(who, line.get(name)) for who, name in _IDLE]
    shares = [f"{who} {seconds / step:.0%}" for who, seconds in idle if seconds is not None and step]
    return [*parts, f"idle: {', '.join(shares)}"] if shares else parts


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
