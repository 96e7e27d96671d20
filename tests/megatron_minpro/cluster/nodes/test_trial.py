"""Real processes of two nodes that add up over gloo, one of which is stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from megatron_minpro.cluster.nodes.trial import NodeTrial
from rollout.ports import free_ports
from rollout.trial.events import Plan

REPOSITORY = Path(__file__).resolve().parents[4]
ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.ranks
def test_a_rank_that_hangs_is_named_and_its_node_told_apart() -> None:
    def start() -> NodeTrial:
        return NodeTrial(python=Path(sys.executable), environment=ENVIRONMENT, role="trainer", members=2, import_engine=False)

    [port] = free_ports("127.0.0.1", 1)
    with start() as one, start() as other, ThreadPoolExecutor() as threads:
        for trial in (one, other):
            trial.wait_for_devices(time.monotonic() + 300)
            assert trial.device_faults() == [] and trial.devices == 0
        [last] = [process for process in psutil.Process().children(recursive=True) if process.ppid() == other.pid][1:]
        last.send_signal(signal.SIGSTOP)

        def take_part(trial: NodeTrial, first: int) -> list[str]:
            plan = Plan(
                store_address="127.0.0.1",
                store_port=port,
                keeps_store=first == 0,
                backend="gloo",
                ranks=4,
                receivers=0,
                members=2,
                first=first,
                master_address="127.0.0.1",
                timeout_s=5.0,
            )
            return trial.take_part(plan, time.monotonic() + 12.0)

        of_one, of_other = (threads.submit(take_part, trial, 2 * number) for number, trial in enumerate((one, other)))
        assert any("rank 3: a sum over all ranks with gloo: not begun in time" in line for line in of_other.result())
        [line] = of_one.result()
        assert line.startswith("rank 0, rank 1: a sum over all ranks with gloo")
    assert psutil.wait_procs([last], timeout=60)[1] == []  # a stopped process too
