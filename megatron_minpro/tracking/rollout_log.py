"""RUN_DIR/rollouts/step_000012.jsonl: every response sampled in a global step, for people to read."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.tracking.late_files import LateFiles

ROLLOUTS_FOLDER = "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRecord:
    """One response as a person wants to read it."""

    sample_id: str
    group: int | None  # of the batch; None where it is not trained
    prompt_id: str
    prompt: str
    response: str  # everything after the prompt: in a conversation also what the environment said
    answer: Any  # the label
    extracted: str | None  # the answer found in the response
    error: str | None  # why grading failed; the response then counts as wrong
    reward: float
    advantage: float
    policy_version: int  # newest weights that sampled it
    finish_reason: str
    num_response_tokens: int
    dropped: str | None  # why it is not trained; None when it is


def rollout_file(run_dir: Path, global_step: int) -> Path:
    """The file with the responses that were sampled in a step."""
    return run_dir / ROLLOUTS_FOLDER / f"step_{global_step:06d}.jsonl"


def read_rollouts(path: Path, numbers: Collection[int]) -> list[dict[str, Any]]:
    """The lines with these numbers, from 0, as far as the file has them; none where it does not exist.

    No other line is parsed, and nothing behind the last of them is read: rank 0 asks for a few lines of a file of many megabytes.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for number, line in enumerate(islice(file, max(numbers) + 1)) if number in numbers]


class RolloutLog:
    """Keeps one file per global step. A full disk or a file system that does not answer costs the file and a warning, not the run."""

    def __init__(self, run_dir: str | Path) -> None:
        self._run_dir = Path(run_dir)
        self._folder = self._run_dir / ROLLOUTS_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = LateFiles(self._folder)

    def write(self, global_step: int, records: Iterable[RolloutRecord]) -> Path:
        """Write one step's file, whole or not at all. A file of that step is replaced."""
        path = rollout_file(self._run_dir, global_step)
        text = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        self._files.write(path.name, lambda: write_atomically(path, text, durable=False), may_be_lost=True)
        return path

    def truncate_after(self, global_step: int) -> None:
        """Delete the files of every later step."""
        for path in self._folder.glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > global_step:
                path.unlink()
