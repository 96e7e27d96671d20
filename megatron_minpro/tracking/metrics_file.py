"""What a run writes down while it goes: metrics.jsonl and TensorBoard, readable rollouts, a heartbeat.

One rank writes; the console, the plots and the summary only read the files, so they can belong to another process.

Global steps count from 0; step k samples batch k and trains batch k - staleness, so the first steps only sample and the last only train.
Metric names that the console, the plots and the summary know (others are kept, and shown in TensorBoard):

    reward               mean reward of all responses sampled in this step, those that dynamic sampling dropped included
    lag_min, lag_max     optimizer steps between the sampling weights and the weights each mini-batch met
    prefix_min_ratio, hard_clip_fraction, soft_clip_fraction, entropy    of the trained tokens
    unit_ratio_fraction  of the trained tokens; all of them at a lag is warned of (idle_clip.py)
    trained_batches      batches trained so far
    tokens_per_second    response tokens sampled and trained over the step's wall time
    seconds/<phase>      wall time of sample, score, update, sync; seconds/step is their sum
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_convert.atomic_files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
PROGRESS_FILE = "progress.json"
TENSORBOARD_FOLDER = "tensorboard"
ROLLOUTS_FOLDER = "rollouts"


class MetricsWriter:
    """Appends one line per global step to metrics.jsonl and the same numbers to TensorBoard. One writer at a time."""

    def __init__(self, run_dir: str | Path, *, tensorboard: bool) -> None:
        """Continues the files of an earlier attempt; a last line that a crash cut short is removed. Makes run_dir.

        Raises ValueError when metrics.jsonl holds anything else than lines of this writer.
        """
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self._run_dir / METRICS_FILE
        _cut_unfinished_line(self.path)
        self._last_step: int | None = None
        for line in read_metrics(self.path):
            self._last_step = int(line["global_step"] or 0)
        self._file = self.path.open("a", encoding="utf-8")
        self._wants_tensorboard = tensorboard
        self._events: SummaryWriter | None = None

    def write(self, global_step: int, metrics: Mapping[str, float]) -> None:
        """One line, flushed. A value that is not finite is written as null and left out of TensorBoard.

        Raises ValueError when global_step does not follow the steps already written (see truncate_after).
        """
        if self._last_step is not None and global_step <= self._last_step:
            raise ValueError(f"{self.path}: step {global_step} follows step {self._last_step}; expected a later one")
        values = {key: _finite(value) for key, value in metrics.items()}
        self._file.write(json.dumps({"global_step": global_step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = global_step
        if self._wants_tensorboard:
            events = self._open_events(global_step)
            for key, value in values.items():
                if value is not None:
                    events.add_scalar(key, value, global_step)
            events.flush()

    def truncate_after(self, global_step: int) -> None:
        """Forget every step after global_step (-1: all of them), so that a resumed run writes them anew. TensorBoard hides them too."""
        self.close()
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if json.loads(line)["global_step"] <= global_step]
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._last_step = json.loads(kept[-1])["global_step"] if kept else None
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flush to the disk and close. Calling it again does nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_events(self, global_step: int) -> SummaryWriter:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import; console and summary do without

            # purge_step: events of an earlier attempt from this step on are void.
            self._events = SummaryWriter(str(self._run_dir / TENSORBOARD_FOLDER), purge_step=global_step)
        return self._events


def read_metrics(path: str | Path) -> Iterator[dict[str, float | None]]:
    """The complete lines of a metrics.jsonl, in order; nothing when the file does not exist.

    Raises ValueError naming file and line for anything that is not a JSON object with a global_step.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                return  # being written right now
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: expected one JSON object per line ({error.msg})") from None
            if not isinstance(line, dict) or not isinstance(line.get("global_step"), int):
                raise ValueError(f"{path}:{number}: expected a JSON object with a whole number global_step")
            yield line


def _finite(value: float) -> float | None:
    value = value if isinstance(value, int) else float(value)
    return value if math.isfinite(value) else None


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete != len(content):
        write_atomically(path, content[:complete])


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRecord:
    """One response as a person wants to read it."""

    prompt_id: str
    prompt: str
    response: str
    answer: str  # the label
    extracted: str | None  # the answer found in the response
    error: str | None  # why grading failed; the response then counts as wrong
    reward: float
    advantage: float
    policy_version: int  # newest weights that sampled it
    finish_reason: str
    num_response_tokens: int
    dropped: str | None  # why it is not trained; None when it is


class RolloutLog:
    """Keeps the responses sampled in every global step as JSON lines: run_dir/rollouts/step_000012.jsonl."""

    def __init__(self, run_dir: str | Path) -> None:
        self._folder = Path(run_dir) / ROLLOUTS_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, global_step: int, records: Iterable[RolloutRecord]) -> Path:
        """Write one step's file, whole or not at all; a file of that step is replaced."""
        path = self._folder / f"step_{global_step:06d}.jsonl"
        write_atomically(path, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records), durable=False)
        return path

    def truncate_after(self, global_step: int) -> None:
        """Delete the files of every later step."""
        for path in self._folder.glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > global_step:
                path.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands, for a console in another process."""

    phase: str  # what goes on now: base model, starting servers, evaluation before, rollout, update, ...
    global_step: int  # batches trained so far
    detail: str = ""  # a remark beside the phase, such as "1,200 of 1,600 steps"
    updated_at: float = 0.0  # seconds since the epoch; write_progress fills it in


def write_progress(run_dir: str | Path, progress: Progress) -> None:
    """Replace run_dir/progress.json."""
    text = json.dumps({**asdict(progress), "updated_at": time.time()})
    write_atomically(Path(run_dir) / PROGRESS_FILE, text + "\n", durable=False)


def read_progress(run_dir: str | Path) -> Progress | None:
    """The latest heartbeat, or None before the first."""
    path = Path(run_dir) / PROGRESS_FILE
    if not path.exists():
        return None
    return Progress(**json.loads(path.read_text(encoding="utf-8")))
