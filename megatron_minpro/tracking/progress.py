"""RUN_DIR/progress.json: where a run stands, for a console in another process."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically

PROGRESS_FILE = "progress.json"
DONE, STOPPED = "done", "stopped"  # phases of a run that has ended
ENDED_PHASES = (DONE, STOPPED)
WAIT = "wait"  # the trainer's phase while it has nothing to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What goes on now."""

    phase: str  # base model, starting servers and ranks, evaluation before, sample, update, export, done, ...
    global_step: int  # batches trained so far
    detail: str = ""  # a remark beside the phase, such as "1,200 of 1,600 steps"
    beside: str = ""  # what the servers do at the same time
    updated_at: float = 0.0  # seconds since the epoch; write_progress fills it in

    @property
    def activities(self) -> tuple[str, ...]:
        """What goes on at the same time. A trainer that waits for the servers does nothing."""
        return tuple(name for name in (self.beside, self.phase) if name and (name != WAIT or not self.beside))


def write_progress(run_dir: str | Path, progress: Progress) -> None:
    """Replace run_dir/progress.json."""
    text = json.dumps({**asdict(progress), "updated_at": time.time()})
    write_atomically(Path(run_dir) / PROGRESS_FILE, text + "\n", durable=False)


def read_progress(run_dir: str | Path) -> Progress | None:
    """The latest progress, or None before the first."""
    path = Path(run_dir) / PROGRESS_FILE
    if not path.exists():
        return None
    return Progress(**json.loads(path.read_text(encoding="utf-8")))
