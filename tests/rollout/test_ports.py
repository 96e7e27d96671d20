"""Ports for servers and ranks: free, and never the same for two processes that ask at the same time."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rollout import ports
from rollout.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
ASK = "import rollout.ports as p; p._FREE_PORTS = range({first}, {last}); print(p.free_ports('127.0.0.1', 1)[0], flush=True); input()"


def test_free_ports_are_different() -> None:
    assert len(set(free_ports("127.0.0.1", 10))) == 10


def test_a_port_that_somebody_listens_on_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = free_ports("127.0.0.1", 1)
    monkeypatch.setattr(ports, "_FREE_PORTS", range(first, first + 1))
    monkeypatch.setattr(ports, "_claim", lambda port: True)
    assert free_ports("127.0.0.1", 1) == [first]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        with pytest.raises(RuntimeError, match="fewer than 1 free ports"):
            free_ports("127.0.0.1", 1)


def test_a_port_given_out_is_nobody_elses_until_the_process_ends() -> None:
    [first] = free_ports("127.0.0.1", 1)
    [last] = free_ports("127.0.0.1", 1)
    # Only two ports to choose from, both this process's: another process that asks finds none.
    for port in (first, last):
        done = ask(port, port + 1)
        assert done.wait(30) != 0
        assert done.stderr is not None and "fewer than 1 free ports" in done.stderr.read()


def test_a_port_is_free_again_when_its_process_has_ended() -> None:
    [spare] = free_ports("127.0.0.1", 1)
    ports._claims.pop().close()
    holder = ask(spare, spare + 1)
    assert holder.stdout is not None and int(holder.stdout.readline()) == spare
    assert not ports._claim(spare)
    holder.kill()
    holder.wait(30)
    assert ports._claim(spare)


def ask(first: int, last: int) -> subprocess.Popen[str]:
    """A process that asks for one port of a range, and holds it until its input ends."""
    program = ASK.format(first=first, last=last)
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
