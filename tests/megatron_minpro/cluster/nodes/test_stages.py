"""What members of a trial said, and did not say, in words."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_minpro.cluster.nodes.stages import faults
from rollout.trial.events import Event, Stage

SUM: Stage = "sum over NCCL"


def done(member: int, stage: Stage) -> list[Event]:
    return [Event(member=member, stage=stage, state="began"), Event(member=member, stage=stage, state="done")]


def judge(events: Sequence[Event], *, ended: str | None = None) -> list[str]:
    """Four members that must have computed and added up."""
    wanted: dict[int, Sequence[Stage]] = {member: ("device", SUM) for member in range(4)}
    return faults(events, wanted=wanted, label=lambda member: f"rank {member}", program_ended=ended)


def test_members_that_did_everything_have_no_fault() -> None:
    assert judge([event for member in range(4) for stage in ("device", SUM) for event in done(member, stage)]) == []


def test_a_member_that_failed_is_named_beside_those_that_waited_for_it() -> None:
    events = [event for member in range(4) for event in done(member, "device")]
    events += [Event(member=member, stage=SUM, state="began") for member in range(4)]
    events.append(Event(member=2, stage=SUM, state="failed", error="RuntimeError: remote error"))
    assert judge(events) == [
        "rank 0, rank 1, rank 3: a sum over all ranks with NCCL: not done in time",
        "rank 2: a sum over all ranks with NCCL failed: RuntimeError: remote error",
    ]


def test_a_member_that_hangs_earlier_is_told_apart() -> None:
    events = [event for member in range(3) for stage in ("device", SUM) for event in done(member, stage)]
    assert judge([*events, Event(member=3, stage="device", state="began")]) == ["rank 3: a small computation: not done in time"]
    assert judge(events) == ["rank 3: a small computation: not begun in time"]


def test_a_program_that_ended_is_the_reason() -> None:
    events = [event for member in range(3) for stage in ("device", SUM) for event in done(member, stage)]
    assert judge([*events, *done(3, "device")], ended="its Python ended with exit code -6") == [
        "rank 3: a sum over all ranks with NCCL: its Python ended with exit code -6"
    ]


def test_lines_of_libraries_are_no_events() -> None:
    assert Event.from_line("[Gloo] Rank 0 is connected to 1 peer ranks\n") is None
    assert Event.from_line('{"description": {}}\n') is None
    event = Event(member=1, stage="weight broadcast", state="failed", error="x", devices=8, device="NVIDIA H100")
    assert Event.from_line(event.to_line()) == event
