"""The sampling process as rank 0 sees it: started early, asked like a sampler in this process, ended with the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from megatron_minpro.loop.sampled_batch import SampledBatch
from megatron_minpro.run.sampling import child
from megatron_minpro.run.sampling.channel import Channel
from megatron_minpro.working_folder import child_environment
from parallel.cuda_environment import without_ours
from rollout.background import in_background
from rollout.exec_with_parent import die_with_parent, with_parent
from rollout.rolling_gate import Give

_END_TIMEOUT_S = 10.0
# They are for the run: rank 0, or the launcher, decides what follows. A job's signal reaches every process of a rank.
_IGNORED = (signal.SIGINT, signal.SIGUSR1)


class SamplingProcess:
    """The `Sampler` of a run. Its calls raise ChannelClosed, with how it ended, when the process is gone."""

    def __init__(self, run_dir: Path, *, forked: bool = False) -> None:
        """Start it: it reads RUN_DIR/config.yaml and loads tokenizer and prompts at once.

        Call this from the thread that lives longest: the kernel ends the process with the thread that started it.

        Args:
            forked: from this process, which has imported what it needs: importing takes 4 s. Then this process must have no other thread
                and must not have looked at CUDA.
        """
        ours, theirs = socket.socketpair()
        self.pid, self._code = (_forked if forked else _executed)(run_dir, theirs, ours)
        theirs.close()
        self._functions: dict[str, Callable[..., Any]] = {}  # what the process may call
        describe_end = partial(_describe_end, self.pid, self._code)
        self._channel = Channel(ours, self._functions, other_side="the sampling process", describe_end=describe_end)
        self._channel.listen()
        self._code.add_done_callback(lambda _: self._channel.close())  # a process that it started may still hold its end open

    def offer_weights(self, give: Give) -> None:
        """Before `start`, with publish: rolling. give: called in a thread of its own when a server is free for other weights."""
        self._functions["give"] = give

    def start(self, *, endpoints: Sequence[str], cursor: Mapping[str, Any] | None, next_step: int, device_type: str) -> dict[str, Any]:
        """Continue where the run stands; before all else. The state of the prompt cursor. Arguments and errors: build.build_sampler."""
        return self._channel.call("start", endpoints=endpoints, cursor=cursor, next_step=next_step, device_type=device_type)

    def draw(self, step: int) -> None:
        """See Sampler."""
        self._channel.call("draw", step)

    def collect(self, step: int, *, policy_version: int) -> SampledBatch:
        """See Sampler. The batch's streams lie in shared memory, and nowhere else once the process has sent them."""
        return self._channel.call("collect", step, policy_version=policy_version)

    def measure(self, *, policy_version: int) -> dict[str, float]:
        """See Sampler."""
        return self._channel.call("measure", policy_version=policy_version)

    def example_tokens(self, num_prompts: int) -> list[tuple[int, ...]]:
        """See Sampler."""
        return self._channel.call("example_tokens", num_prompts)

    def close(self) -> None:
        """End the process: at once when calls are under way that nobody waits for, or else after its graders."""
        if not self._channel.awaits_answers:
            self._channel.call("close")
        self._channel.close()
        try:
            self._code.result(_END_TIMEOUT_S)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            self._code.result()


def _executed(run_dir: Path, theirs: socket.socket, _ours: socket.socket) -> tuple[int, Future[int]]:
    """Its process id, and its exit code (negative: a signal) once it has ended."""
    command = [sys.executable, "-u", "-m", child.__name__, str(run_dir), str(theirs.fileno())]
    popen = subprocess.Popen(
        with_parent(command, ignored=_IGNORED),
        stdin=subprocess.DEVNULL,
        env=without_ours(child_environment()),
        pass_fds=[theirs.fileno()],
    )
    return popen.pid, in_background(popen.wait, name="end of the sampling process")


def _forked(run_dir: Path, theirs: socket.socket, ours: socket.socket) -> tuple[int, Future[int]]:
    """As _executed."""
    parent_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            for number in _IGNORED:
                signal.signal(number, signal.SIG_IGN)
            die_with_parent(parent_pid=parent_pid)
            ours.close()
            child.serve(run_dir, theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # serve ends the process itself
    return pid, in_background(lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), name="end of the sampling process")


def _describe_end(pid: int, code: Future[int]) -> str:
    name = f"the sampling process (pid {pid})"
    try:
        ended = code.result(_END_TIMEOUT_S)
    except TimeoutError:
        return f"{name} closed the connection and runs on"
    how = f"was ended by {signal.Signals(-ended).name}" if ended < 0 else f"ended with exit code {ended}, see the log"
    return f"{name} {how}"
