"""Real runs of the `minpro` command: real ranks, real servers, in processes that can be found again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollout.sglang.control import ServerRefused, check_engine
from tests.command_pool import CommandPool, ForkedCommand

ROOT = Path(__file__).resolve().parents[2]
MARK = "MINPRO_TEST_MARK"


class Command:
    """A running `minpro` command whose whole offspring carries a mark in its environment.

    pool: forks it; without one it is a new process, as a shell starts it.
    """

    process: subprocess.Popen[str] | ForkedCommand

    def __init__(self, arguments: list[str], *, pool: CommandPool | None = None, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        marked = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **environment}
        if pool is not None:
            self.process = pool.start(arguments, environment=marked)
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_minpro.cli", *arguments],
            cwd=ROOT,
            env=marked,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout_s: float = 900) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.wait(), out, err

    def offspring(self) -> list[psutil.Process]:
        """Every living process that carries the mark, the command itself excepted."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == self.mark
                if marked and process.pid != self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """The trainer's ranks, in their order: forked, one after the other, from a process with the same command line."""
        found = []
        for process in self.offspring():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "megatron_minpro.run.forked_ranks" in " ".join(process.cmdline()):
                    found.append((process.create_time(), process.pid, process.ppid(), process))
        parents = {pid for _, pid, parent, _ in found if parent not in {pid for _, pid, _, _ in found}}
        return [process for _, _, parent, process in sorted(found, key=lambda one: one[:2]) if parent in parents]

    def survivors(self, deadline_s: float = 60) -> list[str]:
        """What is still alive of it after deadline_s seconds; empty as soon as nothing is."""
        deadline = time.monotonic() + deadline_s
        while alive := self.offspring():
            if time.monotonic() > deadline:
                return [" ".join(process.cmdline())[:200] for process in alive]
            time.sleep(0.1)
        return []

    def kill_everything(self) -> None:
        for process in [*self.offspring(), psutil.Process(self.process.pid)] if self.process.poll() is None else self.offspring():
            process.kill()


@pytest.fixture(scope="session")
def command_pool() -> Iterator[CommandPool]:
    """Forks commands."""
    with CommandPool() as pool:
        yield pool


@contextlib.contextmanager
def starting(pool: CommandPool | None) -> Iterator[Callable[..., Command]]:
    """Starts commands; whatever a failing test leaves is killed."""
    started: list[Command] = []

    def start(*arguments: str, **environment: str) -> Command:
        started.append(Command(list(arguments), pool=pool, **environment))
        return started[-1]

    yield start
    for command in started:
        command.kill_everything()


@pytest.fixture
def minpro(command_pool: CommandPool) -> Iterator[Callable[..., Command]]:
    """Starts commands that find their imports done."""
    with starting(command_pool) as start:
        yield start


@pytest.fixture
def new_minpro() -> Iterator[Callable[..., Command]]:
    """Starts commands as a shell does."""
    with starting(None) as start:
        yield start


def wait_for(condition: Callable[[], Any], command: Command, timeout_s: float = 600, *, every_s: float = 0.1) -> Any:
    """The first true value of condition, looked at every so often. Fails when the command ends first, or too much time passes."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert command.process.poll() is None, command.process.communicate()
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(every_s)
    return value


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_times(rows: list[dict[str, Any]], *, but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Metrics that a repeated run must repeat: all but wall times and how the servers fared, and `but` what a test says differs."""
    changing = ("time/", "servers/", "throughput/", *but)
    return [{key: value for key, value in row.items() if not key.startswith(changing)} for row in rows]


@pytest.fixture(scope="session")
def short_run_settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The main job, shortened: few warm-up steps, few and small batches; all runs share one base model."""
    folder = tmp_path_factory.mktemp("short_runs")
    return [
        "configs/tiny_moe_cpu.yaml",
        f"output_dir={folder / 'runs'}",
        f"model.path={folder / 'base_model'}",
        "model.warm_up.num_steps=60",
        "model.warm_up.batch_size=32",
        "num_global_steps=5",
        "rollout.prompts_per_step=8",
        "actor.updates_per_step=4",
        "evaluation.num_prompts=8",
        "checkpoint.every=2",
        "tracking.report=false",  # 3 s; the undisturbed run writes one
    ]


@pytest.fixture(scope="session")
def finished_run(short_run_settings: list[str]) -> dict[str, Any]:
    """One undisturbed short run, weights checked after every sync, two steps traced."""
    command = Command(
        [
            "train",
            *short_run_settings,
            "name=undisturbed",
            "tracking.report=true",
            "debug.check_weights=true",
            "checkpoint.keep=4",
            "profile.steps=3-4",
        ]
    )
    try:
        code, out, err = command.wait()
        assert code == 0, err
        survivors = command.survivors()
    finally:
        command.kill_everything()
    run_dir = Path(short_run_settings[1].removeprefix("output_dir=")) / "undisturbed"
    log = (run_dir / "logs/train.log").read_text()
    return {"dir": run_dir, "out": out, "log": log, "survivors": survivors, "metrics": metrics_of(run_dir)}


# A hang costs no more than this: steps of weight updates and of sampling take a tenth of a second here.
TIME_LIMITS = ("rollout.weight_sync_timeout_s=12", "rollout.progress_timeout_s=20")


class TwoServers:
    """Two supervised servers for runs that are not about servers: one takes longer to start than such a run takes to sample.

    They can return experts: to a run that does not ask for them that makes no difference.
    """

    def __init__(self, command: Command, endpoints: list[str]) -> None:
        self.command = command
        self.endpoints = endpoints

    def settings(self, count: int) -> list[str]:
        """A run with these samples on the first `count` of them."""
        return ["rollout.servers=0", f"rollout.endpoints={json.dumps(self.endpoints[:count])}", *TIME_LIMITS]

    def wait_for_both(self) -> None:
        """Wait until both answer: one that an earlier test has killed or stopped takes some seconds to start."""

        def answer() -> bool:
            try:
                for endpoint in self.endpoints:
                    check_engine(endpoint, key=None, timeout_s=5)
            except ServerRefused:
                return False
            return True

        wait_for(answer, self.command)

    def kill_one(self) -> None:
        """It is started again by its supervisor."""
        servers = [process for process in self.command.offspring() if "rollout.sglang.cpu" in " ".join(process.cmdline())]
        min(servers, key=lambda process: process.create_time()).send_signal(signal.SIGKILL)

    def stop_one(self) -> psutil.Process:
        """What computes in one of them stands still, and its HTTP process goes on. Its supervisor starts the server again."""
        computing = [process for process in self.command.offspring() if process.name().startswith("sglang::schedul")]
        stopped = min(computing, key=lambda process: process.create_time())
        stopped.suspend()
        return stopped


@pytest.fixture(scope="session")
def two_servers(
    short_run_settings: list[str], finished_run: dict[str, Any], command_pool: CommandPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoServers]:
    """They run until the last end-to-end test is over."""
    folder = tmp_path_factory.mktemp("two_servers")
    command = Command(
        ["serve", *short_run_settings, "rollout.servers=2", "actor.routing_replay=server", *TIME_LIMITS, "--folder", str(folder)],
        pool=command_pool,
    )
    try:
        path = folder / "endpoints.json"
        yield TwoServers(command, json.loads(wait_for(lambda: path.exists() and path.read_text(), command)))
    finally:
        command.kill_everything()


def interrupt(command: Command) -> None:
    """Ctrl-C, as a terminal sends it to the command."""
    command.process.send_signal(signal.SIGINT)
