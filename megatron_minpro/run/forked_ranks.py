"""All ranks of a run on one machine without CUDA: `python -m megatron_minpro.run.forked_ranks COUNT RUN_DIR {train|warm_up}`.

They are forked from this process, which has imported what they need: importing takes a rank longer than most of what a small run does.
They meet as under torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). As under torchrun the first rank that fails ends the
others, and this process fails. A process that has looked at CUDA cannot be forked, so there torchrun starts the ranks.
"""

from __future__ import annotations

import os
import signal
import sys

from megatron_minpro.run import rank
from rollout.ports import free_ports

_HOST = "127.0.0.1"


def main(arguments: list[str]) -> None:
    """Entry point of the process that is forked, and of the ranks."""
    count, run = int(arguments[0]), rank.prepare(arguments[1:])
    [port] = free_ports(_HOST, 1)
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": _HOST, "MASTER_PORT": str(port)}
    ranks: dict[int, int] = {}
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
            run()
            return  # the interpreter ends as in any other process
        ranks[pid] = number
    sys.exit(wait_for_all(ranks))


def wait_for_all(ranks: dict[int, int]) -> int:
    """1 as soon as one of them has failed and the others are ended, 0 when all have ended well.

    Args:
        ranks: process id -> rank.
    """
    while ranks:
        pid, status = os.wait()
        number, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            print(f"rank {number} (pid {pid}) {how}; the other ranks are ended", file=sys.stderr, flush=True)
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            for other in ranks:
                os.waitpid(other, 0)
            return 1
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
