"""RUN_DIR/attempts.jsonl: from which state each start of a job began and how it ended, for people and for `after_attempt.decide`.

One line when an attempt begins, one when it ends. An attempt that Slurm ended (preemption, a dead node) has no second line.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_minpro.run.run_folder import ATTEMPTS_FILE, LATEST_FILE, STATE_FILE
from megatron_minpro.tracking.json_lines import JsonLines, read_json_lines

Outcome = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Place:
    """Where a run stands. A later place is greater, since the names of checkpoints are in the order of the states."""

    checkpoint: str = ""  # its name; empty before the first
    policy_version: int = 0  # updates done

    def __str__(self) -> str:
        return f"{self.checkpoint} (policy version {self.policy_version})" if self.checkpoint else "the beginning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a job. ended, outcome and step are None until it ends."""

    number: int  # 0 for the first start, then one more with every requeue
    began: Place
    ended: Place | None = None
    outcome: Outcome | None = None
    step: str | None = None  # which step of the job ended: preflight, serve, train
    exit_code: int | None = None  # of that step


def place_of(checkpoint: Path | None) -> Place:
    """Where a checkpoint stands; the beginning without one. Raises ValueError naming a run.json that does not say."""
    if checkpoint is None:
        return Place()
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return Place(checkpoint=checkpoint.name, policy_version=int(state["policy_version"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the state of a run ({' '.join(str(error).split())})") from error


def newest_place(run_dir: Path) -> Place:
    """Where the newest complete checkpoint stands. Raises ValueError as `place_of`."""
    pointer = run_dir / "checkpoints" / LATEST_FILE
    return place_of(pointer.parent / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None)


def record_beginning(run_dir: Path, *, job: str, number: int, checkpoint: Path | None) -> None:
    """One line: this attempt of this job begins with `checkpoint`."""
    place = place_of(checkpoint)
    _append(
        run_dir,
        {
            "job": job,
            "attempt": number,
            "event": "began",
            **asdict(place),
        },
    )


def record_end(run_dir: Path, attempt: Attempt, *, job: str, reason: str, then: str) -> None:
    """One line: how the attempt ended, and what follows."""
    assert attempt.ended is not None
    _append(
        run_dir,
        {
            "job": job,
            "attempt": attempt.number,
            "event": attempt.outcome,
            "step": attempt.step,
            "exit_code": attempt.exit_code,
            **asdict(attempt.ended),
            "reason": reason,
            "then": then,
        },
    )


def read_attempts(run_dir: Path, *, job: str) -> list[Attempt]:
    """The attempts of one job, in order. Raises ValueError naming file and line for one that is not of this file."""
    path = run_dir / ATTEMPTS_FILE
    found: list[Attempt] = []
    for number, (_, line) in enumerate(read_json_lines(path), start=1):
        try:
            if line["job"] != job:
                continue
            place = Place(checkpoint=line["checkpoint"], policy_version=line["policy_version"])
            if line["event"] == "began":
                found.append(Attempt(number=line["attempt"], began=place))
            else:
                began = found.pop().began
                found.append(
                    Attempt(
                        number=line["attempt"],
                        began=began,
                        ended=place,
                        outcome=line["event"],
                        step=line["step"],
                        exit_code=line["exit_code"],
                    )
                )
        except (KeyError, IndexError) as error:
            raise ValueError(f"{path}:{number}: expected an attempt that began or ended ({type(error).__name__}: {error})") from error
    return found


def _append(run_dir: Path, record: dict[str, object]) -> None:
    with closing(JsonLines(run_dir / ATTEMPTS_FILE)) as file:
        file.append({"at": time.strftime("%F %T"), **record})
