"""Asking other nodes, each a real listener of this machine."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from megatron_minpro.cluster.nodes.reach import Listener, leave_file, remove_files, try_to_reach
from megatron_minpro.cluster.nodes.report import NodeReport
from rollout.ports import free_ports


def node(name: str, port: int) -> NodeReport:
    return NodeReport(node=name, role="trainer", gpus=0, address="127.0.0.1", port=port)


def test_a_node_finds_who_is_there_and_who_wrote_its_file(tmp_path: Path) -> None:
    listener = Listener("127.0.0.1")
    leave_file(tmp_path, "n1")
    others = {"n1": node("n1", listener.port), "n2": node("n2", free_ports("127.0.0.1", 1)[0])}
    found = try_to_reach("n0", others, tmp_path, until=time.monotonic() + 1.0)
    assert found.unreachable == {"n2": "127.0.0.1: Connection refused"} and found.unseen == ("n2",)
    assert found.clocks_s == {"n1": pytest.approx(0.0, abs=0.01)}  # one clock
    remove_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
    listener.close()


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_a_clock_is_compared_without_what_the_way_took(ahead_s: float, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            told = time.time() + ahead_s
            time.sleep(1.0)  # a busy machine
            connection.sendall(f"{told}\n".encode())
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        leave_file(tmp_path, "n1")
        found = try_to_reach("n0", {"n1": node("n1", server.getsockname()[1])}, tmp_path, until=time.monotonic())
    assert abs(found.clocks_s["n1"]) == pytest.approx(3600.0, abs=1.5) and found.clocks_s["n1"] * ahead_s > 0
