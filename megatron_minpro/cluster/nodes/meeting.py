"""How the nodes of a job talk before there is anything else: a TCP store on the first node, in which each says something to all."""

from __future__ import annotations

import datetime
import json
import time

import torch.distributed as dist

from megatron_minpro.cluster.nodes.membership import Membership

_POLL_S = 0.1
_GRACE_S = 10.0  # the others wait a little longer than the first node, which says who was silent


class Meeting:
    """Made on every node at once; the first one keeps the store."""

    def __init__(self, membership: Membership) -> None:
        """Raises TimeoutError when the first node cannot be reached."""
        self._membership = membership
        self._first = membership.index == 0
        address = "0.0.0.0" if self._first else membership.nodes[0]
        timeout = datetime.timedelta(seconds=membership.timeout_s)
        try:
            self._store = dist.TCPStore(address, membership.port, is_master=self._first, wait_for_workers=False, timeout=timeout)
        except dist.DistError as error:
            reason = str(error).splitlines()[0][:200]
            raise TimeoutError(f"preflight: {membership.node} cannot reach {address}, port {membership.port}: {reason}") from error

    def all_say(self, what: str, text: str, *, until: float) -> dict[str, str | None]:
        """What every node said; None for those that were silent until `until` (time.monotonic). The same on all nodes.

        Raises:
            TimeoutError: the first node fell silent.
        """
        self._store.set(f"{what}/{self._membership.node}", text)
        if self._first:
            said = self._collect(what, until)
            self._store.set(f"{what}/all", json.dumps(said))
            return said
        while not self._store.check([f"{what}/all"]):
            if time.monotonic() > until + _GRACE_S:
                raise TimeoutError(f"preflight: {self._membership.nodes[0]} fell silent: no {what} of all nodes came in time")
            time.sleep(_POLL_S)
        told: dict[str, str | None] = json.loads(self._store.get(f"{what}/all").decode())
        return told

    def leave(self, *, among: set[str], until: float) -> None:
        """The store ends with the first node's process: it waits until those `among` the nodes have said that they need it no more."""
        self._store.set(f"left/{self._membership.node}", "1")
        while self._first and time.monotonic() < until + _GRACE_S:
            if all(self._store.check([f"left/{node}"]) for node in among):
                return
            time.sleep(_POLL_S)

    def _collect(self, what: str, until: float) -> dict[str, str | None]:
        said: dict[str, str | None] = dict.fromkeys(self._membership.nodes)
        while None in said.values():
            for node, each in said.items():
                if each is None and self._store.check([f"{what}/{node}"]):
                    said[node] = self._store.get(f"{what}/{node}").decode()
            if time.monotonic() > until:
                break
            time.sleep(_POLL_S)
        return said
