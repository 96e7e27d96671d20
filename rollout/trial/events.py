"""What the program of one node is told, and what its members answer: lines of JSON on its standard input and output."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Stage = Literal["device", "sum over gloo", "sum over NCCL", "weight broadcast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all members of the job do together.

    store_address, store_port: where they meet. keeps_store: this node's program keeps the store there. backend: of the broadcast; with
    nccl the ranks add up over both. ranks: of the trainer. receivers: GPUs of all servers. members: of this node that take part; further
    ones have only computed. first: the number of this node's first member, among the ranks or among the receivers.
    master_address: of the trainer's first node, for the broadcast. timeout_s: of each stage.
    """

    store_address: str
    store_port: int
    keeps_store: bool
    backend: Literal["gloo", "nccl"]
    ranks: int
    receivers: int
    members: int
    first: int
    master_address: str
    timeout_s: float

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Plan:
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A member began or ended a stage. member: 0 is the node's first. error: why it failed."""

    member: int
    stage: Stage
    state: Literal["began", "done", "failed"]
    error: str | None = None
    devices: int = 0  # CUDA devices that it sees; with stage "device"
    device: str = "CPU"

    def to_line(self) -> str:
        return json.dumps({"event": asdict(self)}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Event | None:
        """None for a line that is something else (a library's own words, a description of the environment)."""
        try:
            return cls(**json.loads(line)["event"])
        except (ValueError, KeyError, TypeError):
            return None
