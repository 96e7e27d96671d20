"""What the events of a node's members say: which failed, and which did not finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rollout.trial.events import Event, Stage


def faults(
    events: Iterable[Event], *, wanted: Mapping[int, Sequence[Stage]], label: Callable[[int], str], program_ended: str | None
) -> list[str]:
    """One line for all members that share a fault.

    Args:
        events: of the members, in their order.
        wanted: member -> what it must have done by now, in this order.
        label: what people call a member.
        program_ended: how the program ended that runs them; None while it runs, or when it ended well.
    """
    last = {(event.member, event.stage): event for event in events}
    shared: dict[str, list[int]] = {}
    for member, stages in wanted.items():
        fault = _fault([last.get((member, stage)) for stage in stages], stages, program_ended)
        if fault is not None:
            shared.setdefault(fault, []).append(member)
    return [f"{', '.join(map(label, members))}: {fault}" for fault, members in shared.items()]


def _fault(events: Sequence[Event | None], stages: Sequence[Stage], program_ended: str | None) -> str | None:
    for event, stage in zip(events, stages, strict=True):
        if event is not None and event.state == "done":
            continue
        what = _WORDS[stage]
        if event is not None and event.state == "failed":
            return f"{what} failed: {event.error}"
        if program_ended is not None:
            return f"{what}: {program_ended}"
        return f"{what}: {'not begun' if event is None else 'not done'} in time"
    return None


_WORDS: dict[Stage, str] = {
    "device": "a small computation",
    "sum over gloo": "a sum over all ranks with gloo",
    "sum over NCCL": "a sum over all ranks with NCCL",
    "weight broadcast": "the broadcast of weights to the servers",
}
