"""Which failures put a job back into the queue: the rule as a table, and the file that keeps what was decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro.run.after_attempt import decide, end_attempt, main
from megatron_minpro.run.attempts import Attempt, Outcome, Place, newest_place, record_beginning

START, LATER = Place(), Place(checkpoint="step_000004", policy_version=32)
HALF_LATER = Place(checkpoint="step_000004_half", policy_version=40)


def attempt(
    number: int, began: Place, ended: Place | None, outcome: Outcome | None = "failed", *, step: str = "train", exit_code: int = 1
) -> Attempt:
    return Attempt(number=number, began=began, ended=ended, outcome=outcome, step=step, exit_code=exit_code)


@pytest.mark.parametrize(
    ("attempts", "action", "words"),
    [
        ([attempt(0, START, LATER, "complete", exit_code=0)], "complete", "all batches are trained"),
        ([attempt(0, START, LATER, "stopped", exit_code=0)], "requeue", "stopped with a checkpoint"),
        ([attempt(3, START, LATER, "stopped", exit_code=0)], "stop", "stopped with a checkpoint; not requeued: that was done 3 times"),
        # A failure after progress, and after part of a step.
        ([attempt(0, START, LATER)], "requeue", "from the beginning to step_000004 (policy version 32)"),
        ([attempt(0, LATER, HALF_LATER)], "requeue", "to step_000004_half (policy version 40)"),
        ([attempt(0, START, START), attempt(1, START, LATER), attempt(2, LATER, HALF_LATER)], "requeue", "it came from"),
        # One without: once more, then no more.
        ([attempt(0, START, START)], "requeue", "the first failure without a new checkpoint since the beginning"),
        ([attempt(0, START, START), attempt(1, START, START)], "stop", "the second failure without a new checkpoint since the beginning"),
        ([attempt(0, START, LATER), attempt(1, LATER, LATER)], "requeue", "the first failure without a new checkpoint"),
        ([attempt(0, START, START), attempt(1, START, LATER), attempt(2, LATER, LATER)], "requeue", "the first failure"),
        # What Slurm ended between two failures is no progress.
        ([attempt(0, START, START), attempt(1, START, None, None), attempt(2, START, START)], "stop", "the second failure"),
        # A servers' step is like the training; wrong input and a node that fails its check are not tried again.
        ([attempt(0, START, START, step="serve")], "requeue", "the first failure"),
        ([attempt(0, START, START), attempt(1, START, START, step="serve")], "stop", "the second failure"),
        ([attempt(0, START, START, step="serve", exit_code=2)], "stop", "the input is wrong (exit code 2)"),
        ([attempt(0, START, LATER, exit_code=2)], "stop", "the input is wrong (exit code 2)"),
        ([attempt(0, START, START, step="preflight")], "stop", "the same nodes again"),
        # Never more often than allowed.
        ([attempt(3, START, LATER)], "stop", "not requeued: that was done 3 times (MAX_REQUEUES)"),
        ([attempt(2, START, LATER)], "requeue", "it came from"),
    ],
)
def test_what_follows_the_end_of_an_attempt(attempts: list[Attempt], action: str, words: str) -> None:
    decision = decide(attempts, max_requeues=3)
    assert (decision.action, words in decision.why) == (action, True), decision


def save(run_dir: Path, step: int, version: int) -> Path:
    """What the rule reads of a checkpoint."""
    folder = run_dir / f"checkpoints/step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"counters": {"next_step": step, "trained_batches": step}, "policy_version": version}))
    (run_dir / "checkpoints/latest").write_text(folder.name)
    return folder


def test_the_file_tells_what_happened_to_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_beginning(tmp_path, job="7", number=0, checkpoint=None)
    folder = save(tmp_path, 4, 32)
    (tmp_path / "error.txt").write_text("rank 3: RuntimeError: NCCL\nremote error\n")
    main([str(tmp_path), "7", "train", "1", "20", "training ended with exit code 1"])
    record_beginning(tmp_path, job="7", number=1, checkpoint=folder)  # preempted
    record_beginning(tmp_path, job="8", number=0, checkpoint=folder)  # submitted again by hand
    (tmp_path / "error.txt").unlink()
    (tmp_path / "result.json").write_text('{"complete": true}')
    main([str(tmp_path), "8", "train", "0", "20"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "requeue training ended with exit code 1: rank 3: RuntimeError: NCCL remote error; "
        "it came from the beginning to step_000004 (policy version 32)"
    )
    assert said[1] == "complete all batches are trained"
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    kept = ("job", "attempt", "event", "checkpoint", "policy_version", "exit_code")
    assert [[line.get(name) for name in kept] for line in lines] == [
        ["7", 0, "began", "", 0, None],
        ["7", 0, "failed", "step_000004", 32, 1],
        ["7", 1, "began", "step_000004", 32, None],
        ["8", 0, "began", "step_000004", 32, None],
        ["8", 0, "complete", "step_000004", 32, 0],
    ]
    assert lines[1]["reason"] == "training ended with exit code 1: rank 3: RuntimeError: NCCL remote error"
    assert lines[1]["then"].startswith("requeue it came from")


def test_ranks_that_end_well_without_a_result_have_failed(tmp_path: Path) -> None:
    record_beginning(tmp_path, job="7", number=0, checkpoint=None)
    decision = end_attempt(tmp_path, job="7", step="train", exit_code=0, max_requeues=20, reason="")
    assert decision.action == "requeue" and "the first failure" in decision.why


@pytest.mark.parametrize(("complete", "action"), [("true", "complete all batches"), ("false", "requeue the first failure")])
def test_servers_that_end_fail_a_run_that_still_needs_them(tmp_path: Path, complete: str, action: str) -> None:
    record_beginning(tmp_path, job="7", number=0, checkpoint=None)
    (tmp_path / "result.json").write_text(f'{{"complete": {complete}}}')  # of ranks that were told to stop
    decision = end_attempt(tmp_path, job="7", step="serve", exit_code=1, max_requeues=20, reason="")
    assert str(decision).startswith(action)


def test_an_end_without_a_beginning_is_no_answer(tmp_path: Path) -> None:
    record_beginning(tmp_path, job="7", number=0, checkpoint=None)
    with pytest.raises(ValueError, match=r"attempts.jsonl: holds no attempt of job 8 that has not ended"):
        end_attempt(tmp_path, job="8", step="train", exit_code=1, max_requeues=20, reason="")


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    save(tmp_path, 4, 32)
    (tmp_path / "checkpoints/step_000004/run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step_000004/run.json: not the state of a run \('policy_version'\)"):
        newest_place(tmp_path)
