"""Ranks that are forked: they meet, and the first that fails ends the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.run.forked_ranks import wait_for_all
from megatron_minpro.run.ranks import are_forked
from parallel.capabilities import detect
from tests.conftest import REPOSITORY


def fork(run: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    return pid


def test_all_that_end_well_are_a_success() -> None:
    assert wait_for_all({fork(lambda: None): number for number in range(3)}) == 0


@pytest.mark.parametrize(
    ("end", "said"), [(lambda: os._exit(3), "ended with exit code 3"), (lambda: os.kill(os.getpid(), 9), "was ended by SIGKILL")]
)
def test_the_first_that_fails_is_named_and_ends_the_others(end: Callable[[], None], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    waiting = fork(lambda: time.sleep(600))
    began = time.monotonic()
    assert wait_for_all({waiting: 0, fork(end): 1}) == 1
    assert time.monotonic() - began < 60
    assert "rank 1 (pid" in (words := capfd.readouterr().err) and said in words
    with pytest.raises(ProcessLookupError):
        os.kill(waiting, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("endpoints", "forked"), [("[]", True), ('["http://127.0.0.1:1"]', True), ('["http://127.0.0.1:1","http://10.1.2.3:1"]', False)]
)
def test_ranks_that_servers_elsewhere_meet_are_not_forked(endpoints: str, forked: bool) -> None:
    servers = [] if endpoints == "[]" else ["rollout.servers=0", f"rollout.endpoints={endpoints}"]
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", servers)
    assert are_forked(config, detect()) == (forked and detect().device_type == "cpu")
