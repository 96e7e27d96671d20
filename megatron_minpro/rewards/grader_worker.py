"""The process that grades: one JSON request per line on stdin, JSON replies on stdout.

It may hang or die on a hostile expression. So it is two processes. The first one imports everything and then only waits; the second one is
its fork and answers. When grader_pool.py stops the second one (STOP_SIGNAL to the first), a new fork answers a few milliseconds later:
nothing is imported again, and any number of bombs in a row costs their time limits alone.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
import signal
import sys
from types import FrameType
from typing import Any, TextIO

from megatron_minpro.rewards.equality import same_answer
from megatron_minpro.rewards.grader_signal import STOP_SIGNAL
from megatron_minpro.rewards.mathematics import same_mathematics


def equal_answers(label: str, answer: str, *, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether an answer states the same mathematical object as the label, or a number as near to it as the two tolerances allow.

    Args:
        label: as the data set has it.
        answer: as the model wrote it, box or marker removed.
        relative: tolerance as a part of the label's size.
        absolute: tolerance in the label's unit.

    Returns:
        The verdict.

    Raises:
        ValueError: the label cannot be read.
    """
    mathematics = functools.partial(same_mathematics, relative=relative, absolute=absolute)
    return same_answer(label, answer, relative=relative, absolute=absolute, same_mathematics=mathematics)


def answer_requests(replies: TextIO) -> None:
    """Answer until stdin ends. A first reply names this process; each request is acknowledged before its verdict."""
    sys.set_int_max_str_digits(0)  # a label or an answer may be a long integer; the clock limits the work
    _write(replies, {"ready": os.getpid()})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        _write(replies, {"began": request["number"]})
        # No Python handler: the kernel ends this process even inside C code. So it cannot outlive a parent that was killed meanwhile.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["limit_s"] + 1)
        reply: dict[str, Any]
        try:
            equal = equal_answers(request["label"], request["answer"], relative=request["relative"], absolute=request["absolute"])
            reply = {"equal": equal}
        except MemoryError:
            reply = {"error": "memory limit"}
        except Exception as error:  # any expression may break the parser in any way; the parent counts it as a grading error
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, {**reply, "number": request["number"]})


def _write(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


class _Answering:
    """The fork that answers, as the waiting process knows it."""

    def __init__(self) -> None:
        self.pid = 0  # 0: none at this moment

    def kill(self, *_: int | FrameType | None) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def end(self, *_: int | FrameType | None) -> None:
        """Kill it, reap it and leave."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os._exit(0)


def main() -> None:
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a line that a library prints must not look like a reply
    logging.disable(logging.WARNING)
    equal_answers("\\frac{x}{2}", "0.5x")  # imports and compiles everything before the first clock starts

    answering = _Answering()
    signal.signal(STOP_SIGNAL, answering.kill)
    signal.signal(signal.SIGTERM, answering.end)
    own_signals = {STOP_SIGNAL, signal.SIGTERM}
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, own_signals)  # until `pid` says whom a signal is for
        pid = os.fork()
        if pid == 0:
            for number in (*own_signals, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, own_signals)
            answer_requests(replies)
            os._exit(0)
        answering.pid = pid
        signal.pthread_sigmask(signal.SIG_UNBLOCK, own_signals)
        os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOWAIT
        )  # still a zombie, so that a late signal cannot reach another process with this number
        answering.pid = 0
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            return  # stdin has ended


if __name__ == "__main__":
    main()
