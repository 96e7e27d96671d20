"""The interface of a job, chosen by one rule and given to every step's command."""

from __future__ import annotations

import os
import subprocess
import sys

from megatron_minpro.cluster.interfaces import describe, socket_variables
from rollout.routes import Route

ETHERNET = Route(address="10.0.0.5", interface="eth0")


def test_gloo_and_nccl_get_the_interface_that_leads_to_the_others() -> None:
    assert socket_variables(ETHERNET) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert socket_variables(Route(address="127.0.0.1", interface="lo")) == {}
    assert describe(ETHERNET, {"NCCL_SOCKET_IFNAME": "ib0"}) == (
        "network: the other nodes are reached from 10.0.0.5 on eth0, GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME=ib0 (set by you)"
    )


def test_a_job_of_one_machine_runs_its_command_with_the_users_variables() -> None:
    show = 'import os; print(os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME"))'
    command = [sys.executable, "-m", "megatron_minpro.cluster.interfaces", "127.0.0.1", sys.executable, "-c", show]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    said = subprocess.run(command, env={**environment, "NCCL_SOCKET_IFNAME": "ib7"}, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["network: the other nodes are reached from 127.0.0.1 on lo", "None ib7"]
