"""Nodes that talk through the first one."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_minpro.cluster.nodes.meeting import Meeting
from megatron_minpro.cluster.nodes.membership import Membership
from rollout.ports import free_ports

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def membership(node: str, port: int) -> Membership:
    return Membership(node=node, nodes=NODES, trainers=1, port=port, gpus_per_node=0, timeout_s=60.0)


def test_everybody_hears_everybody_and_who_is_silent() -> None:
    [port] = free_ports("0.0.0.0", 1)
    first, second = (Meeting(membership(node, port)) for node in NODES[:2])
    until = time.monotonic() + 1.0
    with ThreadPoolExecutor() as threads:
        heard = [threads.submit(each.all_say, "report", text, until=until) for each, text in ((first, "a"), (second, "b"))]
        one, other = (each.result() for each in heard)
    assert one == other == dict(zip(NODES, ("a", "b", None), strict=True))
    first.leave(until=time.monotonic())


def test_what_does_not_belong_to_the_job_is_not_heard() -> None:
    [port] = free_ports("0.0.0.0", 1)
    first = Meeting(membership(NODES[0], port))
    for line in (b"GET / HTTP/1.1\n", b'{"what": "report"}\n', b"\xff\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(line)
            assert connection.recv(1) == b""
    assert first.all_say("report", "a", until=time.monotonic()) == dict(zip(NODES, ("a", None, None), strict=True))
    first.leave(until=time.monotonic())


def test_a_first_node_that_is_not_there_is_named() -> None:
    [port] = free_ports("0.0.0.0", 1)
    with pytest.raises(TimeoutError, match=rf"^preflight: 127\.0\.0\.2 cannot reach 127\.0\.0\.1, port {port}"):
        Meeting(membership("127.0.0.2", port)).all_say("report", "b", until=time.monotonic() + 0.3)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--port: {port} on 127\.0\.0\.1 cannot be used \(Address already in use\)"):
            Meeting(membership(NODES[0], port))


def test_a_first_node_that_falls_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_minpro.cluster.nodes.meeting._GRACE_S", 0.0)
    [port] = free_ports("0.0.0.0", 1)
    first, second = (Meeting(membership(node, port)) for node in NODES[:2])
    with pytest.raises(TimeoutError, match=r"^preflight: 127\.0\.0\.1 fell silent: no report of all nodes came in time"):
        second.all_say("report", "b", until=time.monotonic() + 0.3)
    first.leave(until=time.monotonic())
