"""A node's place in a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from megatron_minpro.config import RunConfig

NodeRole = Literal["trainer", "server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """This node's place in the job. trainers: how many of `nodes`, from the first on, train; the others serve.

    gpus_per_node: what each must have; 0 on machines without. timeout_s: of everything together.
    """

    node: str
    nodes: tuple[str, ...]
    trainers: int
    port: int
    gpus_per_node: int
    timeout_s: float

    def __post_init__(self) -> None:
        if self.node not in self.nodes:
            raise ValueError(f"--node is {self.node!r}, expected one of --peers {','.join(self.nodes)}")
        if not 0 < self.trainers <= len(self.nodes):
            raise ValueError(f"--trainers is {self.trainers}, expected 1 to {len(self.nodes)}, the number of --peers")

    @property
    def index(self) -> int:
        return self.nodes.index(self.node)

    @property
    def role(self) -> NodeRole:
        return self.roles[self.node]

    @property
    def roles(self) -> dict[str, NodeRole]:
        return {node: "trainer" if index < self.trainers else "server" for index, node in enumerate(self.nodes)}

    def ports(self, config: RunConfig) -> dict[str, tuple[int, ...]]:
        """Node -> ports of the servers that rollout.endpoints expects on it."""
        found: dict[str, tuple[int, ...]] = dict.fromkeys(self.nodes, ())
        for endpoint in config.rollout.endpoints:
            where = urlsplit(endpoint)
            if where.hostname in found and where.port is not None:
                found[where.hostname] += (where.port,)
        return found

    def devices(self, config: RunConfig) -> dict[str, int]:
        """Node -> GPUs (without GPUs: processes) that the run uses on it."""
        ranks, left = divmod(config.world_size, self.trainers)
        if left:
            raise ValueError(f"world_size: {config.world_size} ranks cannot be shared evenly by {self.trainers} trainer nodes (--trainers)")
        ports = self.ports(config)
        return {node: ranks if role == "trainer" else len(ports[node]) * config.rollout.tp for node, role in self.roles.items()}
