"""A forked command ends, speaks and fails as one that a shell starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_pool import CommandPool
from tests.end_to_end.conftest import MARK, Command

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]


@pytest.mark.parametrize("arguments", [("--version",), ("train", "configs/absent.yaml"), ("report", "--help")])
def test_a_forked_command_says_what_a_new_process_says(
    arguments: tuple[str, ...], minpro: Callable[..., Command], new_minpro: Callable[..., Command]
) -> None:
    forked, new = minpro(*arguments).wait(), new_minpro(*arguments).wait()
    assert forked == new and "".join(forked[1:]).strip()


def test_a_killed_command_and_its_surroundings_are_its_own(command_pool: CommandPool, tmp_path: Path) -> None:
    fifo = tmp_path / "run.yaml"
    os.mkfifo(fifo)  # reading the configuration waits
    process = command_pool.start(["train", str(fifo)], environment={**os.environ, MARK: "of this test"})
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    assert os.getsid(process.pid) == process.pid and process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == process.poll() == -signal.SIGKILL
    process.kill()  # nothing is left to be killed
    assert process.communicate() == ("", "")
