"""What a rehearsal found, as a record that travels as JSON out of the process that rehearsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.rehearsal.request import RehearsalRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Storages of one kind that one call site made, alive at a peak."""

    kind: str
    site: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """Collectives of one kind over one group. bytes_in: what this rank handed over."""

    kind: str
    group: str
    size: int
    backend: str
    calls: int
    bytes_in: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Occurrence:
    """How often something happened at one call site."""

    what: str
    site: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseResult:
    """One phase. Bytes are of device memory: before, at the fullest moment, after; by_kind and holders split the fullest moment.

    timeline: bytes alive, by kind in the order of ledger_kinds.KINDS, at up to 400 moments of the phase. host_peak: bytes of the rank's
    large tensors in host memory.
    """

    name: str
    before: int
    peak: int
    after: int
    by_kind: Mapping[str, int]
    holders: tuple[Holder, ...]
    timeline: tuple[tuple[int, ...], ...]
    host_peak: int
    collectives: tuple[Collective, ...]
    waits: tuple[Occurrence, ...]
    guesses: tuple[Occurrence, ...]
    kernels: int
    seconds: float  # processor time of the rehearsal

    @property
    def num_waits(self) -> int:
        """How often the host waited for the device."""
        return sum(wait.count for wait in self.waits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What ended the rehearsal. kind: the error's class; of_device: CUDA or NCCL would raise it."""

    phase: str
    kind: str
    message: str
    of_device: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalResult:
    """One rank. fault: None when all phases came to their end. micro_batches: of an update, on this rank; tokens: of the largest."""

    request: RehearsalRequest
    stage: int
    micro_batches: int
    micro_batch_tokens: int
    phases: tuple[PhaseResult, ...]
    fault: Fault | None
    torch_version: str
    layers: str
    host_bytes: int  # the most memory that the rehearsing process took

    @property
    def fullest(self) -> PhaseResult:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    def phase(self, name: str) -> PhaseResult:
        """By name. Raises KeyError for a phase that did not run."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def as_json(self) -> dict[str, Any]:
        """The counterpart of `from_json`."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {
            **fields,
            "request": self.request.as_json(),
            "phases": [asdict(phase) for phase in self.phases],
            "fault": None if self.fault is None else asdict(self.fault),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RehearsalResult:
        """The counterpart of `as_json`."""
        return cls(
            **{
                **values,
                "request": RehearsalRequest.from_json(values["request"]),
                "phases": tuple(_phase(phase) for phase in values["phases"]),
                "fault": None if values["fault"] is None else Fault(**values["fault"]),
            }
        )


def _phase(values: Mapping[str, Any]) -> PhaseResult:
    return PhaseResult(
        **{
            **values,
            "holders": tuple(Holder(**each) for each in values["holders"]),
            "timeline": tuple(map(tuple, values["timeline"])),
            "collectives": tuple(Collective(**each) for each in values["collectives"]),
            "waits": tuple(Occurrence(**each) for each in values["waits"]),
            "guesses": tuple(Occurrence(**each) for each in values["guesses"]),
        }
    )
