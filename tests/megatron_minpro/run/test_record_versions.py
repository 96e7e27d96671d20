from __future__ import annotations

import logging
import threading
from dataclasses import replace
from importlib.metadata import version

import pytest

from megatron_minpro.run.record_versions import attempt_versions
from parallel.capabilities import detect
from tests.rollout.generate_stub import Stub, all_good


def test_what_the_servers_say_stands_beside_the_trainers_environment(caplog: pytest.LogCaptureFixture) -> None:
    servers = [Stub(all_good) for _ in range(3)]
    for server, told in zip(servers, ("0.5.23", "0.5.22", None), strict=True):
        server.server_info = {} if told is None else {"version": told}
    endpoints = [server.endpoint for server in servers]
    try:
        with caplog.at_level(logging.WARNING):
            found = attempt_versions(detect(), [*endpoints[:1], *endpoints[:1]], key=None, timeout_s=60.0)
            assert (found["sglang"], found["torch"], caplog.messages) == ("0.5.23", version("torch"), [])
            found = attempt_versions(detect(), [*endpoints, "http://127.0.0.1:9"], key=None, timeout_s=60.0)
    finally:
        for server in servers:
            server.server.shutdown()
            server.server.server_close()
    assert found["sglang"] == "0.5.22, 0.5.23, unknown"
    [warning] = caplog.messages
    assert warning.startswith("the version of a server is not known: http://127.0.0.1:9/server_info: ")


def test_a_gpu_is_named() -> None:
    gpus = replace(detect(), cuda_devices=8, device_name="NVIDIA H200")
    assert attempt_versions(gpus, [], key=None, timeout_s=1.0)["gpu"] == "NVIDIA H200"
    assert "sglang" not in attempt_versions(gpus, [], key=None, timeout_s=1.0)
    assert "gpu" not in attempt_versions(replace(gpus, cuda_devices=0), [], key=None, timeout_s=1.0)


def test_a_server_that_does_not_answer_delays_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Each of two servers answers once the other one is asked, too."""
    both = threading.Barrier(2)
    servers = [Stub(all_good) for _ in range(2)]
    for server in servers:
        server.server_info = {"version": "0.5.23"}
        server.computes = both  # type: ignore[assignment]  # it is waited for in the same way
    try:
        found = attempt_versions(detect(), [server.endpoint for server in servers], key=None, timeout_s=5.0)
    finally:
        both.abort()
        for server in servers:
            server.server.shutdown()
            server.server.server_close()
    assert (found["sglang"], caplog.messages) == ("0.5.23", [])
