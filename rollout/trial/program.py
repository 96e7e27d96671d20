"""One node's part of a trial: `PYTHON -m rollout.trial.program ROLE COUNT [DESCRIBE ARGUMENTS...]`.

Members are forked, one per device, before anything here looks at CUDA: importing torch costs a process seconds. Lines of events.py go to
standard output. One line with the plan comes from standard input; without one (its end) the members end. A line {"over": EXIT_CODE} says
that they have ended; the program stays until its input ends, since the other nodes may still need the store that it keeps.

DESCRIBE is the file of a program that describes the environment; what it would print comes as a line {"description": ...}.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from typing import Literal, NoReturn, cast

import torch  # noqa: F401  imported once for all members
import torch.distributed as dist

from rollout.exec_with_parent import die_with_parent
from rollout.trial.events import Plan
from rollout.trial.member import Member


def main(arguments: list[str]) -> int:
    role, count = cast(Literal["trainer", "server"], arguments[0]), int(arguments[1])
    parent, lock = os.getpid(), multiprocessing.Lock()

    def write(line: str) -> None:
        with lock:  # lines of members never mix
            sys.stdout.write(line)
            sys.stdout.flush()

    pipes: list[int] = []
    for number in range(count):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.close(writing)
            for other in pipes:  # or a member would keep another from seeing the end
                os.close(other)
            die_with_parent(parent_pid=parent)
            _run_member(Member(number, role, write=write), reading)
        os.close(reading)
        pipes.append(writing)
    if len(arguments) > 2:
        describe = runpy.run_path(arguments[2])["describe"]
        description = json.dumps({"description": describe(*arguments[3:5], arguments[5:])})
        write(f"\n{description}\n")  # what was imported may have left a line unfinished
    plan = sys.stdin.readline()
    store = _store(Plan.from_line(plan)) if plan else None
    for pipe in pipes:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and said why
            os.write(pipe, plan.encode())
        os.close(pipe)
    code = int(any([os.waitstatus_to_exitcode(os.wait()[1]) for _ in pipes]))
    write(json.dumps({"over": code}) + "\n")
    sys.stdin.read()
    del store
    return code


def _store(plan: Plan) -> dist.TCPStore | None:
    if not plan.keeps_store:
        return None
    timeout = datetime.timedelta(seconds=plan.timeout_s)
    return dist.TCPStore(plan.store_address, plan.store_port, is_master=True, wait_for_workers=False, timeout=timeout)


def _run_member(member: Member, reading: int) -> NoReturn:
    try:
        with os.fdopen(reading) as pipe:
            well = member.run(pipe.readline)
    except BaseException:
        traceback.print_exc()
        well = False
    os._exit(0 if well else 1)  # without torch's destructors, which can wait for lost members


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
