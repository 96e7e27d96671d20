"""Child processes: logs, signals, and nothing left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rollout.processes import ManagedProcess, fork, spawn, terminate_all
from rollout.reaper import marked_pids

ROOT = Path(__file__).resolve().parents[2]
SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def start(code: str, tmp_path: Path, **options: object) -> ManagedProcess:
    return spawn(
        [sys.executable, "-u", "-c", textwrap.dedent(code)], log_path=tmp_path / "child.log", env=dict(os.environ), name="child", **options
    )  # type: ignore[arg-type]


def wait_for(condition: object, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_output_goes_to_the_log_and_the_end_can_be_described(tmp_path: Path) -> None:
    child = start("import sys; [print('line', i) for i in range(50)]; print('bad thing', file=sys.stderr); sys.exit(3)", tmp_path)
    assert child.wait(20) == 3
    assert child.last_log_lines(2) == ["line 49", "bad thing"]
    assert not child.is_running
    message = child.describe_end(num_lines=1)
    assert (
        f"child (pid {child.pid}) ended with exit code 3" in message
        and str(tmp_path / "child.log") in message
        and message.endswith("bad thing")
    )


def test_log_is_appended_to_and_lines_of_an_earlier_child_are_not_shown(tmp_path: Path) -> None:
    start("print('first')", tmp_path).wait(20)
    second = start("print('second')", tmp_path)
    second.wait(20)
    assert second.last_log_lines(10) == ["second"]
    assert (tmp_path / "child.log").read_text() == "first\nsecond\n"


def test_command_that_does_not_exist_leaves_one_line_in_the_log(tmp_path: Path) -> None:
    child = spawn(["/nowhere/at-all"], log_path=tmp_path / "log", env={}, name="child")
    assert child.wait(20) == 127
    assert child.last_log_lines(5) == ["cannot run /nowhere/at-all: No such file or directory"]


def test_environment_is_the_given_one_and_not_this_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOT_FOR_CHILDREN", "1")
    child = spawn(["/usr/bin/env"], log_path=tmp_path / "log", env={"ONLY": "this"}, name="child")
    child.wait(20)
    # Python names the character set itself where the environment does not (PEP 538).
    assert set(child.last_log_lines(10)) - {"LC_CTYPE=C.UTF-8"} == {"ONLY=this", f"MINPRO_TREE={child.mark}"}


def test_child_has_a_session_of_its_own_and_ignores_the_named_signals(tmp_path: Path) -> None:
    code = "import os, signal, time; print(os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGUSR1).name); time.sleep(60)"
    child = start(code, tmp_path, ignore_signals=[signal.SIGUSR1])
    try:
        wait_for(lambda: child.last_log_lines(1))
        assert child.last_log_lines(1) == ["True SIG_IGN"]
        os.kill(child.pid, signal.SIGUSR1)
        time.sleep(0.1)
        assert child.is_running
    finally:
        child.terminate(0.1)


FAMILY = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep = "import time; time.sleep(60)"
    # A grandchild whose own parent is gone, and one that ignores SIGTERM as this process does.
    subprocess.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleep}'])"])
    subprocess.Popen([sys.executable, "-c", f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {sleep}"])
    print("up", flush=True)
    time.sleep(60)
"""


def family_of_three(tmp_path: Path) -> ManagedProcess:
    child = start(FAMILY, tmp_path)
    # The grandchild whose own parent is gone comes last; before that the parent itself may be counted.
    wait_for(lambda: child.last_log_lines(1) == ["up"] and [len(child.tree()) for _ in range(3)] == [3, 3, 3])
    return child


def test_terminate_ends_the_whole_tree_even_if_it_ignores_sigterm(tmp_path: Path) -> None:
    child = family_of_three(tmp_path)
    members = child.tree()
    began = time.monotonic()
    child.terminate(deadline_s=0.3)
    assert time.monotonic() - began < 10
    assert child.exit_code == -signal.SIGKILL
    assert not any(psutil.pid_exists(member.pid) and member.status() != psutil.STATUS_ZOMBIE for member in members)
    child.terminate()  # again: nothing to do


def test_terminate_sweeps_up_after_a_child_that_was_killed(tmp_path: Path) -> None:
    child = family_of_three(tmp_path)
    members = child.tree()
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    child.terminate(0.1)
    assert not any(psutil.pid_exists(member.pid) and member.status() != psutil.STATUS_ZOMBIE for member in members)


def test_several_trees_share_one_deadline(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    children = [
        spawn([sys.executable, "-c", stubborn], log_path=tmp_path / f"{i}.log", env=dict(os.environ), name=f"child {i}") for i in range(4)
    ]
    for child in children:
        wait_for(lambda child=child: child.last_log_lines(1) == ["up"])
    began = time.monotonic()
    terminate_all(children, deadline_s=3)
    assert time.monotonic() - began < 9, "one after the other would take 12 s"
    assert [child.exit_code for child in children] == [-signal.SIGKILL] * 4


def test_child_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    made: list[ManagedProcess] = []
    thread = threading.Thread(target=lambda: made.append(spawn(SLEEPER, log_path=tmp_path / "log", env=dict(os.environ), name="child")))
    thread.start()
    thread.join()
    [child] = made
    wait_for(lambda: child.last_log_lines(1) == ["up"])
    time.sleep(0.2)
    assert child.is_running
    child.terminate(0.1)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "ends by itself"])
def test_no_child_outlives_its_parent(tmp_path: Path, end: signal.Signals | None) -> None:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from rollout.processes import spawn
        child = spawn({SLEEPER!r}, log_path=Path({str(tmp_path / "child.log")!r}), env=dict(os.environ), name="child")
        while not child.last_log_lines(1):
            time.sleep(0.01)
        print(child.pid, flush=True)
        time.sleep({0 if end is None else 60})
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    if end is not None:
        assert child.is_running()
        parent.send_signal(end)
    parent.wait(10)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout_s=5)


# As torchrun does: a worker in a session of its own. As multiprocessing does: helpers that ignore SIGTERM, each holding the pipe whose
# end the other waits for. The child ends as soon as its worker is up, so that neither parentage nor session leads to the helpers.
WORKER = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
reading, writing = os.pipe()
helpers = []
for _ in range(2):
    helpers.append(os.fork())
    if helpers[-1] == 0:
        os.close(1)
        os.read(reading, 1)
        os._exit(0)
print(*helpers, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
ORPHANS = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], stdout=subprocess.PIPE, start_new_session=True)
print(worker.stdout.readline().decode(), end="", flush=True)
"""


def orphans_of(child: ManagedProcess) -> list[psutil.Process]:
    wait_for(lambda: child.last_log_lines(1))
    return [psutil.Process(int(pid)) for pid in child.last_log_lines(1)[0].split()]


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_terminate_ends_what_a_killed_worker_of_another_session_left(tmp_path: Path) -> None:
    child, other = (spawn(SLEEPER, log_path=tmp_path / f"{name}.log", env=dict(os.environ), name=name) for name in ("bystander", "another"))
    family = start(ORPHANS, tmp_path)
    helpers = orphans_of(family)
    family.wait(10)
    assert len(helpers) == 2 and not any(is_gone(helper) for helper in helpers)
    began = time.monotonic()
    family.terminate(deadline_s=30)
    assert time.monotonic() - began < 15, "helpers that wait for nothing are not waited for until the deadline"
    assert all(is_gone(helper) for helper in helpers)
    assert child.is_running and other.is_running, "other trees are not touched"
    terminate_all([child, other], deadline_s=1)


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "ends by itself"])
def test_no_helper_outlives_a_parent_that_is_gone(tmp_path: Path, end: signal.Signals | None) -> None:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from rollout.processes import spawn
        child = spawn([sys.executable, "-c", {ORPHANS!r}], log_path=Path({str(tmp_path / "child.log")!r}),
                      env=dict(os.environ), name="child")
        while not child.last_log_lines(1):
            time.sleep(0.01)
        print(child.last_log_lines(1)[0], flush=True)
        if os.fork() == 0:  # a forked child of the parent must not keep the reaper waiting
            os.close(1)
            time.sleep(8)
            os._exit(0)
        time.sleep({0 if end is None else 60})
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert parent.stdout is not None
    helpers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(helpers) == 2
    if end is not None:
        assert not any(is_gone(helper) for helper in helpers)
        parent.send_signal(end)
    parent.wait(10)
    wait_for(lambda: all(is_gone(helper) for helper in helpers), timeout_s=5)


def test_marks_of_nested_parents_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINPRO_TREE", "outer/0")
    child = spawn(SLEEPER, log_path=tmp_path / "log", env=dict(os.environ), name="child")
    monkeypatch.delenv("MINPRO_TREE")
    wait_for(lambda: child.last_log_lines(1) == ["up"])
    assert child.pid in marked_pids("outer") and child.pid in marked_pids("outer/0") and child.pid in marked_pids(child.mark)
    assert marked_pids("oute") == marked_pids("outer/00") == []
    child.terminate(0.1)
    assert marked_pids("outer") == []


def test_log_is_for_this_user_only_even_if_an_earlier_one_was_not(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_text("earlier\n")
    log.chmod(0o644)
    child = start("print('hello')", tmp_path)
    child.wait(20)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert child.last_log_lines(5) == ["hello"]


def test_secrets_in_the_log_are_not_shown(tmp_path: Path) -> None:
    child = start(
        "print('args: key-one, key-one-and-more;'); print('x' * 2990 + 'key-one-and-more' + '.' * 994)",
        tmp_path,
        secrets=("key-one", "key-one-and-more"),
    )
    child.wait(20)
    assert child.last_log_lines(5)[0] == "args: [redacted], [redacted];"
    for num_lines in (1, 2, 4):  # the first window begins in the middle of the second key
        assert (
            "key" not in child.describe_end(num_lines=num_lines).split("last lines")[1]
            and "more" not in child.last_log_lines(num_lines)[-1]
        )
    assert "secrets=" not in repr(child)


def _fork(main: Callable[[], object], folder: Path) -> ManagedProcess:
    return fork(main, log_path=folder / "fork.log", name="the copy")


def _raise() -> None:
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: print("done"), 0, "done"),
        (lambda: sys.exit(3), 3, ""),
        (lambda: sys.exit("why"), 1, ""),
        (_raise, 1, "RuntimeError: no luck"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL, ""),
    ],
    ids=["returns", "exits", "exits with a text", "raises", "is killed"],
)
def test_a_fork_ends_as_its_function_does(main: Callable[[], object], code: int, said: str, tmp_path: Path) -> None:
    child = _fork(main, tmp_path)
    assert child.wait(60) == code
    assert child.exit_code == code
    assert "\n".join(child.last_log_lines(1)) == said


def test_a_fork_has_its_own_session_and_the_parents_objects(tmp_path: Path) -> None:
    here = object()
    child = _fork(lambda: print(os.getsid(0) == os.getpid(), id(here), os.read(0, 1)), tmp_path)
    assert child.wait(60) == 0
    assert child.last_log_lines(1) == [f"True {id(here)} b''"]


def test_a_fork_and_its_children_are_terminated(tmp_path: Path) -> None:
    def main() -> None:
        nested = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
        print(nested.pid)
        time.sleep(600)

    child = _fork(main, tmp_path)
    deadline = time.monotonic() + 60
    while not (lines := child.last_log_lines(1)) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.terminate()
    assert child.exit_code == -signal.SIGTERM
    assert not psutil.pid_exists(int(lines[0])) or psutil.Process(int(lines[0])).status() == psutil.STATUS_ZOMBIE


def test_waiting_for_a_fork_has_a_limit(tmp_path: Path) -> None:
    child = _fork(lambda: time.sleep(600), tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    child.terminate()
