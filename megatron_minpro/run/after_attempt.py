"""What follows the end of an attempt: `python -m megatron_minpro.run.after_attempt RUN_DIR JOB STEP EXIT_CODE MAX_REQUEUES [REASON]`.

A job script asks when a step has ended, and obeys. The answer is one line: complete, requeue or stop, and why.
RUN_DIR/attempts.jsonl keeps it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_minpro.run.attempts import Attempt, Outcome, newest_place, read_attempts, record_end
from megatron_minpro.run.run_folder import ATTEMPTS_FILE, ERROR_FILE
from megatron_minpro.tracking.run_files import RESULT_FILE

WRONG_INPUT = 2  # the exit code of every command of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the job script does, and why in words."""

    action: Literal["complete", "requeue", "stop"]
    why: str

    def __str__(self) -> str:
        return f"{self.action} {self.why}"


def decide(attempts: Sequence[Attempt], *, max_requeues: int) -> Decision:
    """What follows the last of a job's attempts, which has just ended.

    A failure after progress is worth another start, however many there were. A failure without progress gets one more, since it may be
    the machine's; the second one at the same place is the run's own.

    Args:
        attempts: of one job, in order.
        max_requeues: how often the job may be put back into the queue, for whatever reason.
    """
    last = attempts[-1]
    if last.outcome == "complete":
        return Decision(action="complete", why="all batches are trained")
    if last.outcome == "failed" and last.exit_code == WRONG_INPUT:
        return Decision(action="stop", why="not requeued: the input is wrong (exit code 2)")
    if last.outcome == "failed" and last.step == "preflight":
        return Decision(action="stop", why="not requeued: the job would get the same nodes again")
    if last.outcome == "failed" and not _progressed(last) and _failed_before(attempts):
        return Decision(action="stop", why=f"not requeued: the second failure without a new checkpoint since {last.began}")
    if last.outcome == "stopped":
        why = "stopped with a checkpoint"
    elif _progressed(last):
        why = f"it came from {last.began} to {last.ended}"
    else:
        why = f"the first failure without a new checkpoint since {last.began}"
    if last.number >= max_requeues:
        return Decision(action="stop", why=f"{why}; not requeued: that was done {last.number} times (MAX_REQUEUES)")
    return Decision(action="requeue", why=why)


def _progressed(attempt: Attempt) -> bool:
    return attempt.ended is not None and attempt.ended > attempt.began


def _failed_before(attempts: Sequence[Attempt]) -> bool:
    """Whether an attempt before the last failed where the last one did: without progress, from the same place."""
    last = attempts[-1]
    return any(one.outcome == "failed" and not _progressed(one) and one.began == last.began for one in attempts[:-1])


def end_attempt(run_dir: Path, *, job: str, step: str, exit_code: int, max_requeues: int, reason: str) -> Decision:
    """Decide, and keep what was decided.

    Args:
        run_dir: the run folder.
        job: of Slurm; attempts of other jobs do not count.
        step: of the job, that ended: preflight, serve or train.
        exit_code: of that step.
        max_requeues: see `decide`.
        reason: what is known of a failure.

    Raises:
        ValueError: the run folder does not say where this attempt began, or where the run stands.
    """
    attempts = read_attempts(run_dir, job=job)
    if not attempts or attempts[-1].outcome is not None:
        raise ValueError(f"{run_dir / ATTEMPTS_FILE}: holds no attempt of job {job} that has not ended")
    ended = replace(attempts[-1], ended=newest_place(run_dir), outcome=_outcome(run_dir, step, exit_code), step=step, exit_code=exit_code)
    decision = decide([*attempts[:-1], ended], max_requeues=max_requeues)
    try:
        record_end(run_dir, ended, job=job, reason=reason, then=str(decision))
    except OSError as error:  # a full disk: the answer counts, and the job's output has it
        print(f"{run_dir / ATTEMPTS_FILE}: not written ({error.strerror})", file=sys.stderr)
    return decision


def _outcome(run_dir: Path, step: str, exit_code: int) -> Outcome:
    """result.json is written by ranks that end well. They may complete a run whose servers have ended: the last batches need none."""
    result = run_dir / RESULT_FILE
    complete = json.loads(result.read_text(encoding="utf-8"))["complete"] if result.exists() else None
    if complete and (step == "serve" or not exit_code):
        return "complete"
    return "failed" if exit_code or complete is None else "stopped"


def main(arguments: Sequence[str]) -> None:
    """Print the decision; before it, of a failure, the reason."""
    run_dir, job, step, exit_code, max_requeues = Path(arguments[0]), arguments[1], arguments[2], int(arguments[3]), int(arguments[4])
    error = run_dir / ERROR_FILE
    said = [*arguments[5:], *([error.read_text(encoding="utf-8").strip()] if error.exists() else [])]
    reason = " ".join(": ".join(said).split())
    decision = end_attempt(run_dir, job=job, step=step, exit_code=exit_code, max_requeues=max_requeues, reason=reason)
    print(decision.action, "; ".join(part for part in (reason, decision.why) if part))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"minpro: error: {error}", file=sys.stderr)
        sys.exit(WRONG_INPUT)
