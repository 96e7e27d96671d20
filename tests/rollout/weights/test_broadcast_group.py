"""Where the weight sync's sockets listen, and that a broadcast still arrives."""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch

from rollout.weights.broadcast_group import BroadcastGroup

ROOT = Path(__file__).resolve().parents[3]


def listening() -> set[tuple[str, int]]:
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def make_group(master_address: str = "127.0.0.1") -> BroadcastGroup:
    return BroadcastGroup(name="test", world_size=2, backend="gloo", master_address=master_address, timeout_s=20, broadcast_s=20)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3", "localhost"])
def test_store_listens_on_the_master_address_alone(address: str) -> None:
    before = listening()
    group = make_group(address)
    [(host, port)] = listening() - before
    assert host == socket.gethostbyname(address) and port == group.port


def test_address_of_another_host_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("weight sync master address '192.0.2.1': cannot listen there (")):
        make_group("192.0.2.1")


def test_members_meet_on_loopback_only_and_the_tensor_arrives() -> None:
    before = listening()
    group = make_group()
    # The other member as a server builds it: with torch alone, in a process of its own.
    member = f"""
        import datetime, torch, torch.distributed as dist
        timeout = datetime.timedelta(seconds=20)
        store = dist.PrefixStore("test", dist.TCPStore("127.0.0.1", {group.port}, 2, False, timeout))
        store = dist.PrefixStore("cpu/", dist.PrefixStore("test/", store))
        group = dist.ProcessGroupGloo(store, 1, 2, timeout=timeout)
        tensor = torch.zeros(5)
        group.broadcast([tensor], dist.BroadcastOptions()).wait()
        print(tensor.tolist())
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(member)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    group.join()
    new = listening() - before
    assert len(new) >= 2, "the store and gloo"
    assert all(ipaddress.ip_address(host).is_loopback for host, _ in new)
    group.broadcast(torch.arange(5.0)).wait()
    assert other.communicate(timeout=200)[0].strip() == "[0.0, 1.0, 2.0, 3.0, 4.0]"
    group.close()
