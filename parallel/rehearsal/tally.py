"""What one rank did in each phase: collectives, waits of the host for the device, kernels, and values that were guessed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from parallel.rehearsal.call_site import call_site


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveKey:
    """Collectives that are counted together."""

    kind: str  # all_gather, reduce_scatter, all_to_all, all_reduce, broadcast, send, recv, ...
    group: str
    size: int
    backend: str


@dataclass(slots=True)
class Tally:
    """Counts of one phase."""

    calls: Counter[CollectiveKey] = field(default_factory=Counter)
    bytes_in: Counter[CollectiveKey] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # what, call site
    guesses: Counter[tuple[str, str]] = field(default_factory=Counter)  # what, call site
    kernels: int = 0

    def collective(self, key: CollectiveKey, num_bytes: int) -> None:
        """One call that hands over so many bytes."""
        self.calls[key] += 1
        self.bytes_in[key] += num_bytes

    def wait(self, what: str) -> None:
        """The host waits for the device here."""
        self.waits[what, call_site()] += 1

    def guess(self, what: str) -> None:
        """The program reads a value that was not computed."""
        self.guesses[what, call_site()] += 1
