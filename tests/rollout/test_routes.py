"""Which address leads to another machine, seen in a network namespace with a second interface and a Debian-like name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.routes import route_to, route_to_others

ROOT = Path(__file__).resolve().parents[2]


def test_this_machine_is_reached_over_loopback() -> None:
    for host in ("localhost", "127.0.0.1", "127.0.1.1"):
        route = route_to(host)
        assert route.is_loopback and route.interface == "lo"
    assert route_to_others(["127.0.0.1", "127.0.1.1"]).address == "127.0.0.1"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^host 'no-such-machine\.invalid': cannot be reached from here"):
        route_to("no-such-machine.invalid")
    with pytest.raises(ValueError, match="no hosts"):
        route_to_others([])


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network of its own: eth0 has 10.78.0.1/24, eth1 has 10.79.0.1/24."""
    if os.geteuid() or shutil.which("ip") is None:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("network namespaces need root and iproute2")
        pytest.skip("network namespaces need root and iproute2")
    name = f"mproute{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        lines = ["link set lo up"]
        for number in (0, 1):
            lines += [f"link add eth{number} type veth peer name far{number}", f"addr add 10.{78 + number}.0.1/24 dev eth{number}"]
            lines += [f"link set eth{number} up", f"link set far{number} up"]
        for line in lines:
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_machine_whose_name_means_loopback_is_reached_elsewhere(namespace: str, tmp_path: Path) -> None:
    """n0 is this machine, as Debian names it; n1 and n2 are on its two networks."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 n0\n10.78.0.2 n1\n10.79.0.2 n2\n")
    code = """
        import psutil
        from rollout.routes import route_to_others
        from rollout.weights.broadcast_group import BroadcastGroup

        def listening():
            return {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}

        for names in (["n0", "n1"], ["n2"], ["n0"], ["10.78.0.1"]):
            route = route_to_others(names)
            print(",".join(names), route.address, route.interface)
        address = route_to_others(["n0", "n1"]).address
        group = BroadcastGroup(name="g", world_size=1, backend="gloo", master_address=address, timeout_s=20, broadcast_s=20)
        group.join()
        print(*sorted(listening()))
        try:
            BroadcastGroup(name="g", world_size=1, backend="gloo", master_address="n0", timeout_s=20, broadcast_s=20)
        except ValueError as error:
            print(error)
    """
    enter = 'mount --make-rprivate /; mount --bind "$1" /etc/hosts; shift; exec "$@"'
    command = ["ip", "netns", "exec", namespace, "unshare", "--mount", "bash", "-ec", enter, "_", str(hosts)]
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr
    own, other, alone, itself, listening, refused = done.stdout.splitlines()
    assert own == "n0,n1 10.78.0.1 eth0"
    assert other == "n2 10.79.0.1 eth1"
    assert alone in ("n0 127.0.0.1 lo", "n0 127.0.1.1 lo")
    assert itself.startswith("10.78.0.1 ")
    assert listening == "10.78.0.1"  # store and gloo, and nothing on loopback or on every interface
    assert "weight sync master address 'n0': means 127.0.1.1 on this host" in refused
