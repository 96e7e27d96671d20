"""Whether an update holds every parameter of a server."""

from __future__ import annotations

from collections.abc import Set

from rollout.sglang.control import ServerRefused
from rollout.weights.checksums import server_parameter
from rollout.weights.server_set import ServerSet
from rollout.weights.weight_sync import NamedTensors, WeightSyncFailed


def each_once(tensors: NamedTensors, seen: set[str]) -> NamedTensors:
    """Passes tensors on and adds their names to `seen`. Raises ValueError when one comes twice."""
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"weight sync: tensor {name} came twice")
        seen.add(name)
        yield name, tensor


class CompletenessCheck:
    """A server keeps its old values for every name that an update leaves out, and says nothing. This says it."""

    def __init__(self, servers: ServerSet) -> None:
        self._servers = servers
        self._names: frozenset[str] | None = None

    def watch(self, tensors: NamedTensors) -> NamedTensors:
        """Passes tensors on; at the end, before any server is told to continue, checks that none was missing or came twice."""
        seen: set[str] = set()
        num_bytes = 0
        for name, tensor in each_once(tensors, seen):
            num_bytes += tensor.nbytes
            yield name, tensor
        self.check(seen, num_bytes=num_bytes)

    def check(self, names: Set[str], *, num_bytes: int) -> None:
        """Raises ValueError unless these are the server's parameters, at the first time, and the same names as then, later.

        num_bytes: of the weights.
        """
        if self._names is None:
            self._check_against_server(names, num_bytes)
            self._names = frozenset(names)
        elif names != self._names:
            missing, extra = sorted(self._names - names), sorted(names - self._names)
            raise ValueError(f"weight sync: tensors differ from the first publish; missing: {missing[:5]}; new: {extra[:5]}")

    def _check_against_server(self, names: Set[str], num_bytes: int) -> None:
        try:
            held = self._servers.parameter_names(num_bytes=num_bytes)
        except ServerRefused as refused:
            raise WeightSyncFailed(f"cannot learn which parameters a server has: {refused}") from refused
        sent = {server_parameter(name)[0] for name in names}
        missing = sorted(held - sent)
        unknown = sorted(sent - held - {"lm_head.weight"})  # tied to the embedding, the server lists it once
        if missing or unknown:
            raise ValueError(f"weight sync: never sent to the server: {missing[:5]}; not in the server: {unknown[:5]}")
