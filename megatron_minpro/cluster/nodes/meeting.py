"""How the nodes of a job talk before there is anything else: each says something to the first node, and hears what all have said.

Over plain TCP, without torch: importing that would take most of the time of a preflight.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

from megatron_minpro.cluster.nodes.membership import Membership

_POLL_S = 0.1
_CONNECT_S = 5.0
_GRACE_S = 10.0  # the others wait a little longer than the first node, which says who was silent


class Meeting:
    """Made on every node at once. The first one listens; each of the others comes with one line of JSON and waits for another."""

    def __init__(self, membership: Membership) -> None:
        """Raises ValueError when the first node's port is not free."""
        self._membership = membership
        self._first = membership.index == 0
        self._changed = threading.Condition()
        self._said: dict[str, dict[str, str]] = {}  # what -> node -> text
        self._told: dict[str, str] = {}  # what -> the answer to all
        self._answering = 0  # nodes that have come and not yet been answered
        if self._first:
            self._listener = self._listen()
            threading.Thread(target=self._accept, daemon=True).start()

    def all_say(self, what: str, text: str, *, until: float) -> dict[str, str | None]:
        """What every node said; None for those that were silent until `until` (time.monotonic). The same on all nodes.

        Raises:
            TimeoutError: the first node cannot be reached, or fell silent.
        """
        told: dict[str, str | None] = json.loads(self._collect(what, text, until) if self._first else self._ask(what, text, until))
        return told

    def leave(self, *, until: float) -> None:
        """The first node waits until all who have come are answered, at most a little beyond `until`: its process may end now."""
        if self._first:
            with self._changed:
                self._changed.wait_for(lambda: not self._answering, max(0.0, until + _GRACE_S - time.monotonic()))
            self._listener.close()

    # -- the first node -----------------------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        both = socket.has_dualstack_ipv6()
        family, port = socket.AF_INET6 if both else socket.AF_INET, self._membership.port
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=len(self._membership.nodes))
        except OSError as error:
            reason = str(error.strerror).partition(" (while ")[0]  # without the address, which is said here
            raise ValueError(f"--port: {port} on {self._membership.node} cannot be used ({reason}); expected a free port") from error

    def _collect(self, what: str, text: str, until: float) -> str:
        nodes = self._membership.nodes
        with self._changed:
            said = self._said.setdefault(what, {})
            said[self._membership.node] = text
            self._changed.wait_for(lambda: said.keys() >= set(nodes), max(0.0, until - time.monotonic()))
            self._told[what] = json.dumps({node: said.get(node) for node in nodes})
            self._changed.notify_all()
            return self._told[what]

    def _accept(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
        except OSError:  # closed
            return

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile(encoding="utf-8") as lines:
            try:
                line = json.loads(lines.readline())
                what, node, text = str(line["what"]), str(line["node"]), str(line["text"])
            except (OSError, ValueError, KeyError, TypeError):  # none of ours
                return
            with self._changed:
                self._answering += 1
                self._said.setdefault(what, {})[node] = text
                self._changed.notify_all()
                self._changed.wait_for(lambda: what in self._told)
            with contextlib.suppress(OSError):  # it has given up
                connection.sendall(self._told[what].encode() + b"\n")
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    # -- the others ---------------------------------------------------------------------------------------------------

    def _ask(self, what: str, text: str, until: float) -> str:
        first = self._membership.nodes[0]
        line = json.dumps({"what": what, "node": self._membership.node, "text": text})
        with self._connect(until) as connection, connection.makefile(encoding="utf-8") as lines:
            connection.settimeout(max(_POLL_S, until + _GRACE_S - time.monotonic()))
            try:
                connection.sendall(line.encode() + b"\n")
                told = lines.readline()
            except OSError:
                told = ""
        if not told:
            raise TimeoutError(f"preflight: {first} fell silent: no {what} of all nodes came in time")
        return told

    def _connect(self, until: float) -> socket.socket:
        """The first node may begin later than this one."""
        where = (self._membership.nodes[0], self._membership.port)
        while True:
            try:
                return socket.create_connection(where, timeout=_CONNECT_S)
            except OSError as error:
                if time.monotonic() > until:
                    reason = error.strerror or error
                    raise TimeoutError(f"preflight: {self._membership.node} cannot reach {where[0]}, port {where[1]}: {reason}") from error
            time.sleep(_POLL_S)
