"""Who is started again and when not, with servers that are a few lines of Python."""

from __future__ import annotations

import dataclasses
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rollout.sglang.server import RESTARTED_VERSION, ServerDied, ServerPool, ServerSettings
from rollout.supervisor import Supervisor

# Ready at once, and healthy; with a file `.cursed` beside the script it dies at its start. With a file `.stuck` it answers /server_info,
# which needs the computing process, only after that file is gone, and to none of the questions of before a restart.
SCRIPT = """
    import http.server, os, sys, time
    port = int(sys.argv[sys.argv.index("--port") + 1])
    print("started with", sys.argv[sys.argv.index("--weight-version") + 1])
    if os.path.exists(f"{sys.argv[0]}.cursed"):
        print("RuntimeError: no such weights"); sys.exit(9)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers["content-length"] or 0))
            while self.path == "/server_info" and os.path.exists(f"{sys.argv[0]}.{port}.stuck"):
                time.sleep(0.05)
            self.send_response(200); self.send_header("content-length", "2"); self.end_headers(); self.wfile.write(b"{}")
        do_POST = do_GET
        log_message = print
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Watched:
    def __init__(self, pool: ServerPool, folder: Path) -> None:
        self.pool, self.folder, self.said = pool, folder, []
        self.supervisors: list[Supervisor] = []

    def supervise(self, **changes: float) -> Supervisor:
        options = {"max_restarts": 2, "window_s": 60, "unresponsive_after_s": 4, "progress_timeout_s": 30, "start_timeout_s": 20}
        options |= changes
        self.supervisors.append(Supervisor(self.pool, announce=self.said.append, **options))  # type: ignore[arg-type]
        return self.supervisors[-1]

    def stick(self, index: int) -> Path:
        """A server's HTTP process alone answers from now on, until the file is gone."""
        file = self.folder / f"script.py.{self.pool.endpoints[index].rpartition(':')[2]}.stuck"
        file.touch()
        return file

    def signal(self, index: int, number: signal.Signals) -> None:
        self.pool.processes[index].popen.send_signal(number)
        if number == signal.SIGKILL:
            self.pool.processes[index].wait(5)

    def until(self, supervisor: Supervisor, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            supervisor.check()
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def back(self, times: int) -> Callable[[], bool]:
        return lambda: sum("runs again" in line for line in self.said) == times


@pytest.fixture
def watched(server_settings: ServerSettings, tmp_path: Path) -> Iterator[Watched]:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -u {tmp_path}/script.py "$@"\n')
    python.chmod(0o755)
    settings = dataclasses.replace(server_settings, server_python=python)
    with ServerPool.start(settings, num_servers=2, log_dir=tmp_path / "logs", start_timeout_s=20) as pool:
        watched = Watched(pool, tmp_path)
        yield watched
        for supervisor in watched.supervisors:
            supervisor.close()


def test_a_dead_server_starts_again_on_its_port_with_an_unwanted_version(watched: Watched) -> None:
    supervisor, endpoints = watched.supervise(), watched.pool.endpoints
    untouched = watched.pool.processes[0].pid
    watched.signal(1, signal.SIGKILL)
    watched.until(supervisor, watched.back(1))
    assert watched.pool.endpoints == endpoints and watched.pool.processes[1].is_running
    assert watched.pool.processes[0].pid == untouched
    log = (watched.folder / "logs/server_1.log").read_text().splitlines()
    assert [line for line in log if line.startswith("started")] == ["started with 0", f"started with {RESTARTED_VERSION}"]
    died, back = watched.said
    assert died.startswith("SGLang server 1 (pid ") and died.endswith("was ended by SIGKILL; restarting it (1 of at most 2 times)")
    assert back == "SGLang server 1 runs again; it gets requests once it has the current weights"


def test_a_hung_server_is_replaced_and_a_slow_machine_is_given_time(watched: Watched) -> None:
    supervisor = watched.supervise()
    hung = watched.pool.processes[0].pid
    watched.signal(0, signal.SIGSTOP)
    began = time.monotonic()
    watched.until(supervisor, watched.back(1))
    assert time.monotonic() - began > 4 and watched.pool.processes[0].pid != hung
    assert watched.said[0].startswith("no answer to 2 health checks in a row: SGLang server 0 (pid ")
    supervisor._silent = [3, 3]
    assert not supervisor._hangs(0), "nobody answers: the machine may be slow"
    supervisor._silent = [8, 8]
    assert supervisor._hangs(0) and supervisor._hangs(1)


def test_a_server_whose_computing_process_is_silent_is_replaced(watched: Watched) -> None:
    """The other one is silent for a while too, as in a long step of a weight update."""
    supervisor = watched.supervise(progress_timeout_s=6)
    busy, stuck = watched.stick(0), watched.stick(1)
    pids = [process.pid for process in watched.pool.processes]
    watched.until(supervisor, lambda: min(supervisor._stuck) > 0)
    busy.unlink()
    watched.until(supervisor, lambda: supervisor._starting != {})
    stuck.unlink()
    watched.until(supervisor, watched.back(1))
    assert watched.said[0].startswith("its computing process has answered nothing for 6 s: SGLang server 1 (pid ")
    assert watched.said[0].endswith("is still running; restarting it (1 of at most 2 times)")
    assert [process.pid == pid for process, pid in zip(watched.pool.processes, pids, strict=True)] == [True, False]
    watched.until(supervisor, lambda: supervisor._stuck == [0, 0])


def test_a_server_that_dies_too_often_is_given_up_and_the_last_is_an_error(watched: Watched) -> None:
    supervisor = watched.supervise(max_restarts=1)
    watched.signal(1, signal.SIGKILL)
    watched.until(supervisor, watched.back(1))
    watched.signal(0, signal.SIGKILL)
    watched.until(supervisor, watched.back(2))  # each server has its own count
    watched.signal(1, signal.SIGKILL)
    supervisor.check()
    said = watched.said[-1]
    assert said.startswith("after 1 restarts within 60 s: SGLang server 1 (pid ")
    assert said.endswith("was ended by SIGKILL; it is given up, 1 of 2 server(s) here are left")
    watched.signal(0, signal.SIGKILL)
    with pytest.raises(
        ServerDied, match=r"^after 1 restarts within 60 s: SGLang server 0 .* was ended by SIGKILL; last lines of .*server_0"
    ):
        supervisor.check()


def test_a_server_that_hangs_too_often_is_ended(watched: Watched) -> None:
    supervisor = watched.supervise(max_restarts=0, progress_timeout_s=2)
    watched.stick(1)
    watched.until(supervisor, lambda: watched.said != [])
    assert watched.said[0].endswith("it is given up, 1 of 2 server(s) here are left")
    assert [process.is_running for process in watched.pool.processes] == [True, False]


def test_restarts_before_the_window_are_forgotten(watched: Watched) -> None:
    supervisor = watched.supervise(max_restarts=1, window_s=0.01)
    for times in (1, 2, 3):
        watched.signal(1, signal.SIGKILL)
        watched.until(supervisor, watched.back(times))


def test_a_start_that_fails_counts_as_a_death(watched: Watched) -> None:
    supervisor = watched.supervise()
    (watched.folder / "script.py.cursed").touch()
    watched.signal(1, signal.SIGKILL)
    watched.until(supervisor, lambda: len(watched.said) == 3)
    assert [line.rpartition(" (")[2] for line in watched.said[:2]] == ["1 of at most 2 times)", "2 of at most 2 times)"]
    assert watched.said[2].startswith("after 2 restarts within 60 s: SGLang server 1") and "exit code 9; it is given up" in watched.said[2]
    watched.signal(0, signal.SIGKILL)
    with pytest.raises(ServerDied, match=r"(?s)^after 2 restarts within 60 s: SGLang server 0 .*exit code 9.*no such weights"):
        watched.until(supervisor, lambda: False)


def test_a_pool_that_is_stopped_during_a_restart_leaves_no_server(watched: Watched) -> None:
    supervisor = watched.supervise()
    watched.signal(1, signal.SIGKILL)
    supervisor.check()
    watched.pool.stop()
    time.sleep(0.5)
    assert not any(process.is_running for process in watched.pool.processes)
