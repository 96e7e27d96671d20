"""`minpro` commands for tests, forked from one process that has imported what they need: importing costs more than most of them do.

    with CommandPool() as pool:
        process = pool.start(["train", "configs/tiny_moe_cpu.yaml"], environment={**os.environ, "MY_MARK": "1"})
        code, out, err = process.communicate(timeout=60)

The ranks of `minpro train` are forked too, where the system lets a process say what it is (shown_process.py): whoever looks for a command's
processes by command line or environment finds them as if they had been started. Other children of a command are started as ever.

This file is both the tests' side and, started as a program, the process that is forked: requests come in as lines of JSON, process ids go
out, and exit codes into files.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.shown_process import show

ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.02


class ForkedCommand:
    """A running (or ended) command, with those methods of subprocess.Popen that tests use."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self._folder = folder

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        path = self._folder / "code"
        return int(path.read_text()) if path.exists() else None

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; its exit code. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.returncode) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("minpro", timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; stdout and stderr."""
        self.wait(timeout)
        return (self._folder / "out").read_text(), (self._folder / "err").read_text()

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens after its end."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class CommandPool:
    """The parent of all commands. Commands that still run when it is closed are killed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="minpro_commands_")
        self._started = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_pool"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, arguments: Sequence[str], *, environment: Mapping[str, str]) -> ForkedCommand:
        """`minpro arguments...` in the repository's folder, in a session of its own, with exactly this environment."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder = Path(self._folder.name) / str(self._started)
        folder.mkdir()
        self._started += 1
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": str(folder)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the commands' parent has ended: exit code {self._process.wait()}"
        return ForkedCommand(int(answer), folder)

    def close(self) -> None:
        """End the parent, which kills what still runs."""
        self._process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> CommandPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _fork_ranks(environment: Mapping[str, str]) -> None:
    """In the forked process: its ranks are forked from it, not from a new process that imports what this one has imported."""
    from megatron_minpro.run import forked_ranks, launcher

    if not show(environment=[f"{name}={value}" for name, value in environment.items()]):
        return
    become_ranks, start_workers = forked_ranks.main, launcher.start_workers

    def main(arguments: list[str]) -> None:
        assert show(arguments=[sys.executable, "-m", forked_ranks.__name__, *arguments])
        become_ranks(arguments)

    def start_preloaded(config: Any, task: str, **_: bool) -> Any:
        return start_workers(config, task, preloaded=True)

    forked_ranks.main, launcher.start_workers = main, start_preloaded


def _become(request: Mapping[str, Any]) -> list[str]:
    """In the forked process: what a shell would have given it. Its arguments."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    _fork_ranks(request["environment"])
    return request["arguments"]


def _report_ends(running: dict[int, Path]) -> None:
    """Write the exit codes of those that have ended, and forget them. running: process id -> folder."""
    while running and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        folder = running.pop(ended.si_pid)
        (folder / "writing").write_text(str(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status))
        (folder / "writing").rename(folder / "code")
        os.waitpid(ended.si_pid, 0)  # only now may its id be another process's


def _serve() -> list[str] | None:
    """Fork until the tests end. In a forked process: the arguments of its command."""
    running: dict[int, Path] = {}
    while True:
        _report_ends(running)
        if not select.select([sys.stdin], [], [], _POLL_S)[0]:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return _become(request)
        running[pid] = Path(request["folder"])
        print(pid, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _main() -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  these imports are what commands find done

    import megatron_minpro.evaluation.run
    import megatron_minpro.report.plots
    import megatron_minpro.run.launcher
    import megatron_minpro.run.worker  # noqa: F401
    from megatron_minpro import cli

    gc.freeze()  # commands need not look at what is imported, nor copy its pages
    arguments = _serve()
    if arguments is not None:
        cli.main(arguments)  # the interpreter ends as in any other process


if __name__ == "__main__":
    _main()
