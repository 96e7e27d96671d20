"""Trainer ranks for tests, forked from one process that has imported torch and Megatron-Core: importing costs more than most tests run.

    ranks.run(Path("scan_ranks.py"), folder, world_size=4)

runs the script as `__main__` on four ranks that meet as under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). This file is both the
tests' side and, started as a program, the process that is forked: requests come in as lines of JSON, exit codes go out.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.01


class RankPool:
    """The parent of all ranks of a test session. python_path: folders that come before this repository and its environment."""

    def __init__(self, *, python_path: tuple[Path, ...] = ()) -> None:
        path = os.pathsep.join(str(folder) for folder in (*python_path, ROOT))
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script: Path, *arguments: object, world_size: int, timeout_s: float = 1100) -> None:
        """Run a script on new ranks and wait for their end. Fails with what they wrote unless all ended with 0 in time."""
        from rollout.ports import free_ports

        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            [port] = free_ports("127.0.0.1", 1)
            words = [str(argument) for argument in arguments]
            request = {"script": str(script), "arguments": words, "world_size": world_size, "port": port}
            self._process.stdin.write(json.dumps({**request, "timeout_s": timeout_s, "folder": folder}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            said = "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(Path(folder).iterdir()))
        assert answer, f"the ranks' parent has ended: exit code {self._process.wait()}\n{said}"
        assert json.loads(answer) == [0] * world_size, f"exit codes {answer.strip()} (-9: not done after {timeout_s:g} s)\n{said}"

    def close(self) -> None:
        """End the parent. It has no ranks outside of `run`."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _fork_rank(rank: int, request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself already
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)  # whatever it starts itself can be ended with it
        log = os.open(Path(request["folder"]) / f"rank {rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world_size"], "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in {**names, "MASTER_PORT": request["port"]}.items()})
        sys.path.insert(0, str(Path(request["script"]).parent))
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run(request: dict[str, Any]) -> list[int] | None:
    """Exit codes, in the order of ranks; None when the test session has ended meanwhile. No rank is left running."""
    running = {_fork_rank(rank, request): rank for rank in range(request["world_size"])}
    codes = [0] * request["world_size"]
    deadline = time.monotonic() + request["timeout_s"]
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            _kill_group(pid)
        owner_is_gone = bool(select.select([sys.stdin], [], [], 0)[0])  # nothing is sent before the answer
        if owner_is_gone or any(codes) or time.monotonic() > deadline:  # as under torchrun: one rank's failure ends the others
            for other in running:
                _kill_group(other)
        if owner_is_gone:
            return None
        time.sleep(0 if pid else _POLL_S)
    return codes


def _serve() -> None:
    import torch

    import parallel.actor  # noqa: F401  the imports that every rank finds done

    torch.set_num_threads(1)
    for line in iter(sys.stdin.readline, ""):
        codes = _run(json.loads(line))
        if codes is None:
            return
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    _serve()
