"""Device memory: every storage with its size, where it was made, what it holds, when it came and went.

Time is counted in allocations and frees. Sizes are rounded up to 512 bytes, as torch's CUDA allocator does. A phase's peak is split up
after the phase, when it is known what each storage was for.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.rehearsal.call_site import call_site
from parallel.rehearsal.ledger_kinds import ACTIVATIONS, KINDS, TEMPORARY
from parallel.rehearsal.result import Holder

_BLOCK = 512
_NAMED_BYTES = 1 << 20  # a smaller storage's call site is not looked up
_POINTS = 400  # of a timeline


@dataclass(slots=True, eq=False)
class _Held:
    num_bytes: int
    site: str
    born: int
    kind: str | None = None  # of what outlives a pass; the others are activations once a backward pass waits for them
    saved: int | None = None
    died: int | None = None

    def kind_at(self, time: int) -> str:
        if self.kind is not None:
            return self.kind
        return ACTIVATIONS if self.saved is not None and self.saved <= time else TEMPORARY


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """peak: bytes at the fullest moment, split by kind and by holder. before, after: bytes alive at both ends.

    timeline: what was alive, by kind in the order of KINDS, at up to 400 moments.
    """

    before: int
    peak: int
    after: int
    by_kind: Mapping[str, int]
    holders: tuple[Holder, ...]
    timeline: tuple[tuple[int, ...], ...]


class MemoryLedger:
    """See the module."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0  # since `begin`
        self._peak_time = 0
        self._before = 0
        self._start = 0
        self._time = 0
        self._alive: dict[int, tuple[_Held, weakref.ref[object]]] = {}  # by the address of the storage
        self._phase: list[_Held] = []  # alive at its start or born in it

    def track(self, tensor: Tensor) -> None:
        """Count the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._time += 1
        held = _Held(num_bytes, call_site() if num_bytes >= _NAMED_BYTES else "tensors below 1 MiB", self._time)

        def gone(_: object) -> None:
            if self._alive.get(address, (None,))[0] is held:
                self._remove(address)

        self._alive[address] = (held, weakref.ref(storage, gone))
        self._phase.append(held)
        self.live += num_bytes
        if self.live > self.peak:
            self.peak, self._peak_time = self.live, self._time

    def _remove(self, address: int) -> None:
        held, _ = self._alive.pop(address)
        self._time += 1
        held.died = self._time
        self.live -= held.num_bytes

    def resized(self, storage: torch.UntypedStorage) -> None:
        """The storage was given another size in place, as Megatron does to free what it will recompute."""
        if storage._cdata in self._alive:
            self._remove(storage._cdata)
            self._add(storage)

    def mark(self, tensor: Tensor, kind: str) -> None:
        """Say what a storage on the device holds, for as long as it lives; the first word counts. Host memory is not counted."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        if found is not None and found[0].kind is None:
            found[0].kind = kind

    def save_for_backward(self, tensor: Tensor) -> None:
        """From now on a backward pass waits for this tensor."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        if found is not None and found[0].saved is None:
            found[0].saved = self._time

    def begin(self) -> None:
        """A phase begins."""
        self._phase = [held for held, _ in self._alive.values()]
        self._before = self.peak = self.live
        self._start = self._peak_time = self._time

    def end(self) -> PhaseMemory:
        """The phase that `begin` began is over."""
        by_kind: Counter[str] = Counter()
        holders: Counter[tuple[str, str]] = Counter()
        for held in self._phase:
            if held.born <= self._peak_time and (held.died is None or held.died > self._peak_time):
                kind = held.kind_at(self._peak_time)
                by_kind[kind] += held.num_bytes
                holders[kind, held.site] += held.num_bytes
        return PhaseMemory(
            before=self._before,
            peak=self.peak,
            after=self.live,
            by_kind={kind: by_kind[kind] for kind in KINDS if by_kind[kind]},
            holders=tuple(Holder(kind=kind, site=site, num_bytes=size) for (kind, site), size in holders.most_common()),
            timeline=_timeline(self._phase, since=self._start),
        )


def _timeline(held: list[_Held], *, since: int) -> tuple[tuple[int, ...], ...]:
    """What was alive by kind: at the start, at the fullest moment of each stretch of time, at the end."""
    alive = dict.fromkeys(KINDS, 0)
    changes: list[tuple[int, str, int]] = []
    for each in held:
        kind = each.kind_at(max(each.born, since))
        if each.born <= since:
            alive[kind] += each.num_bytes
        else:
            changes.append((each.born, kind, each.num_bytes))
        if kind == TEMPORARY and each.saved is not None:
            changes += [(each.saved, TEMPORARY, -each.num_bytes), (each.saved, ACTIVATIONS, each.num_bytes)]
            kind = ACTIVATIONS
        if each.died is not None:
            changes.append((each.died, kind, -each.num_bytes))
    changes.sort(key=lambda change: change[0])
    fullest = tuple(alive.values())
    points = [fullest]
    stretch = max(1, len(changes) // _POINTS)
    for number, (_, kind, size) in enumerate(changes, start=1):
        alive[kind] += size
        fullest = max(fullest, tuple(alive.values()), key=sum)
        if number % stretch == 0 or number == len(changes):
            points.append(fullest)
            fullest = tuple(alive.values())
    return (*points, tuple(alive.values()))
