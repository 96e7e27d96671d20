"""Starts the process that rehearses, and reads what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from parallel.rehearsal.request import RehearsalRequest
from parallel.rehearsal.result import RehearsalResult

_LAST_WORDS = 2000  # characters of a failed process


def rehearse(requests: Sequence[RehearsalRequest], *, progress: Callable[[str], None] = lambda phase: None) -> list[RehearsalResult]:
    """Rehearse all requests, one after the other, in one new process.

    Args:
        requests: ranks, of one run or of several.
        progress: told which phase of which rank begins.

    Raises:
        ValueError: in one line, what cannot be rehearsed: a torch of another version, a missing g++, an operator without a fake kernel,
            a layout or an option that the actor refuses.
        RuntimeError: the process ended without an answer; holds its last words.
    """
    return list(_answers(requests, progress))


def _answers(requests: Sequence[RehearsalRequest], progress: Callable[[str], None]) -> Iterator[RehearsalResult]:
    command = [sys.executable, "-P", "-m", "parallel.rehearsal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            # The process answers nothing on stderr before it ends, except a failure's traceback: the pipe cannot fill up first.
            json.dump([request.as_json() for request in requests], process.stdin)
            process.stdin.close()
            found = 0
            for line in process.stdout:
                answer = json.loads(line)
                if "phase" in answer:
                    progress(answer["phase"])
                elif "refused" in answer:
                    raise ValueError(answer["refused"])
                else:
                    found += 1
                    yield RehearsalResult.from_json(answer["result"])
            if found < len(requests):
                last = process.stderr.read().strip()[-_LAST_WORDS:]
                raise RuntimeError(f"the rehearsing process ended with exit code {process.wait()}: {last}")
        finally:
            process.kill()
