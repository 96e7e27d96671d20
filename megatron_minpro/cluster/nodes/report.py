"""What each node says of itself, in two rounds: alone, and when it knows where the others are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import TypeAdapter

from megatron_minpro.cluster.installation import Installation
from megatron_minpro.cluster.nodes.membership import NodeRole

Report = TypeVar("Report")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node's facts.

    device_faults: why small computations on its devices failed. address, interface: from which it reaches the others. port: where it can
    be tried. store_port: the first node's, where all members of the trial meet. means: node -> address that the name means on it.
    interfaces: of this machine. installation: of its role; None when that could not be described. variables: of NCCL and gloo, as the
    role's processes get them. versions: of packages. ports_in_use: that its servers need. free_bytes: where the run folder lies.
    memory_bytes: of host memory, available. missing: what the run needs and it lacks.
    """

    node: str
    role: NodeRole
    gpus: int
    device_faults: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"
    port: int = 0
    store_port: int = 0
    means: dict[str, str] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ()
    installation: Installation | None = None
    variables: dict[str, str] = field(default_factory=dict)
    ports_in_use: tuple[int, ...] = ()
    free_bytes: int = 0
    memory_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachReport:
    """What one node finds when it asks the others.

    unreachable: node -> reason. clocks_s: node -> how far that node's clock is ahead of this one's, at least. unseen: nodes whose file in
    the run folder it does not see.
    """

    node: str
    unreachable: dict[str, str] = field(default_factory=dict)
    clocks_s: dict[str, float] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialReport:
    """What failed on one node while all took part."""

    node: str
    faults: tuple[str, ...] = ()


def to_json(report: NodeReport | ReachReport | TrialReport) -> str:
    return TypeAdapter(type(report)).dump_json(report).decode()


def from_json(kind: type[Report], text: str) -> Report:
    return TypeAdapter(kind).validate_json(text)
