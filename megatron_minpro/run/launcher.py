"""`minpro train` on one machine: the run folder, the base model, servers and trainer ranks as child processes, the console, the end.

Everything that computes happens in children; this process starts them, watches them and leaves none behind.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import rich.console

from checkpoints_convert.atomic_files import write_atomically
from checkpoints_convert.hf_config import read_architecture
from megatron_minpro.config import RunConfig, dump_config
from megatron_minpro.loop.logprob_gap import gap_warning
from megatron_minpro.loop.stop_time import stop_warning
from megatron_minpro.objectives.idle_clip import idle_clip
from megatron_minpro.run import base_model
from megatron_minpro.run.attempt_clock import AttemptClock
from megatron_minpro.run.ctrl_c import CtrlC
from megatron_minpro.run.finished import stopped, write_page, write_report
from megatron_minpro.run.page_at_checkpoints import PageAtCheckpoints, start_page
from megatron_minpro.run.preflight import check_run_folder, check_start
from megatron_minpro.run.ranks import are_forked, fork_ranks, on_loopback, start_forked_ranks, start_ranks
from megatron_minpro.run.run_folder import (
    ENDPOINTS_FILE,
    ERROR_FILE,
    INITIAL_MODEL_FOLDER,
    LOCK_FILE,
    PAGE_FILE,
    STOP_FILE,
    forget_unfinished_attempt,
)
from megatron_minpro.run.run_state import read_state
from megatron_minpro.run.serving import server_settings, supervise
from megatron_minpro.tracking.console import Console
from megatron_minpro.tracking.progress import PROGRESS_FILE, Progress, write_progress
from megatron_minpro.tracking.run_files import CONFIG_FILE, RESULT_FILE
from parallel.capabilities import detect
from rollout.processes import ManagedProcess
from rollout.sglang.server import ServerPool
from rollout.weights.loaded import check_pool

_REFRESH_S = 0.3
_FULL_DISK_BYTES = 1 << 20


class Interrupted(RuntimeError):
    """Ctrl-C: the run stopped with a checkpoint (or, asked twice, at once)."""


def run(config: RunConfig, *, resume: str, preloaded: bool = False) -> Path:
    """Train to the end.

    Args:
        config: of the run.
        resume: auto | never | must.
        preloaded: this process has imported what ranks need and may be forked, so it forks them where a process would import for them.

    Returns:
        The run folder. Whatever happens, no child survives.

    Raises:
        ValueError: input that cannot work, before anything starts.
        RuntimeError: a rank or a server failed; with its last words.
        Interrupted: after Ctrl-C.
    """
    with rich.console.Console(stderr=True).status("checking model, prompts and machine"):
        check_start(config, resume=resume, capabilities=detect(), machine=True)
    run_dir = config.run_dir
    with _ownership(run_dir), CtrlC() as ctrl_c:
        resumed = prepare_run_folder(config, resume=resume)
        clock = AttemptClock(run_dir)
        with (
            clock.written(),
            clock.phase("total"),
            Console(
                run_dir,
                num_global_steps=config.num_global_steps,
                name=config.name,
                resumed_from=resumed,
                alarms=(
                    idle_clip,
                    partial(gap_warning, config=config),
                    partial(stop_warning, allowed_s=config.checkpoint.stop_within_s),
                ),
            ) as console,
        ):
            with clock.phase("base_model"):
                ensure_base_model(config, console, ctrl_c, preloaded=preloaded)
            with clock.phase("train_and_servers"):
                _train(config, console, ctrl_c, preloaded=preloaded)
        result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
        if not result["complete"]:
            raise Interrupted(stopped(result))
        console.log(write_report(config, run_dir, {**result["seconds"], **clock.seconds()}))
        if config.tracking.report:
            console.log(f"Its page: {write_page([run_dir], run_dir / PAGE_FILE)}")
    return run_dir


def make_base_model(config: RunConfig, *, preloaded: bool = False) -> None:
    """Make model.path, when it does not exist, and nothing else. The run folder gets configuration and logs.

    Args:
        config: of a run that is not trained.
        preloaded: see `run`.

    Raises:
        ValueError, RuntimeError, Interrupted: as `run`.
    """
    check_start(config, resume="auto", capabilities=detect(), machine=True)
    with _ownership(config.run_dir), CtrlC() as ctrl_c:
        prepare_run_folder(config, resume="auto")
        with Console(config.run_dir, num_global_steps=config.num_global_steps, name=config.name, resumed_from=None) as console:
            ensure_base_model(config, console, ctrl_c, preloaded=preloaded)


@contextmanager
def _ownership(run_dir: Path) -> Iterator[None]:
    """Only one `minpro train` at a time writes into a run folder. Raises ValueError when another one does."""
    new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run_dir}: is being trained by another process; expected a new name=...") from None
        try:
            yield
        except ValueError:
            if new and {path.name for path in run_dir.iterdir()} == {LOCK_FILE}:
                shutil.rmtree(run_dir)  # wrong input leaves no trace
            raise


def prepare_run_folder(config: RunConfig, *, resume: str) -> int | None:
    """Make the run folder, or accept one that a former attempt left. The last global step already done, None for a fresh run.

    Raises ValueError when `resume` and the folder disagree, or when it belongs to another configuration (the differences are named).
    """
    checkpoint = check_run_folder(config, resume=resume)
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        forget_unfinished_attempt(run_dir)
    for name in (STOP_FILE, ENDPOINTS_FILE, ERROR_FILE, RESULT_FILE, PROGRESS_FILE):
        (run_dir / name).unlink(missing_ok=True)
    write_atomically(run_dir / CONFIG_FILE, dump_config(config))
    if checkpoint is None:
        return None
    return read_state(checkpoint).counters.next_step - 1


def ensure_base_model(config: RunConfig, console: Console, ctrl_c: CtrlC, *, preloaded: bool) -> None:
    """Make model.path when it does not exist. preloaded: see `run`."""
    if Path(config.model.path).exists():
        return
    assert config.model.warm_up is not None
    run_dir = config.run_dir
    destination = Path(config.model.path) if config.model.warm_up.num_steps == 0 else run_dir / INITIAL_MODEL_FOLDER
    if destination != Path(config.model.path):
        shutil.rmtree(destination, ignore_errors=True)
    base_model.write_initial_model(config.model, config.prompts, destination)
    config.layout.check_model(read_architecture(destination))
    if config.model.warm_up.num_steps:
        write_progress(run_dir, Progress(phase="base model", global_step=0, detail="starting"))
        ranks = start_workers(config, "warm_up", preloaded=preloaded)
        try:
            _watch(ranks, console, lambda: None, ctrl_c, run_dir, stop_gently=False)
        finally:
            ranks.terminate()


def start_workers(config: RunConfig, task: str, *, preloaded: bool = False) -> ManagedProcess:
    """All ranks of the run, on this machine. preloaded: see `run`."""
    arguments, count, name = [str(config.run_dir), task], config.world_size, f"trainer ({task})"
    log_path = config.run_dir / "logs" / f"{task}.log"
    ignored = (signal.SIGUSR1,)  # it asks the workers to stop; their parent would die of it
    if are_forked(config, detect()):
        start = fork_ranks if preloaded else start_forked_ranks
        return start(arguments, count=count, name=name, log_path=log_path, ignore_signals=ignored)
    return start_ranks(
        "megatron_minpro.run.rank",
        arguments,
        count=count,
        name=name,
        log_path=log_path,
        loopback=on_loopback(config),
        ignore_signals=ignored,
    )


def _train(config: RunConfig, console: Console, ctrl_c: CtrlC, *, preloaded: bool) -> None:
    run_dir = config.run_dir
    write_progress(run_dir, Progress(phase="starting servers and ranks", global_step=0))
    pool = None
    ranks = None
    supervisor = None
    pages = None
    if config.tracking.report_at_checkpoints:
        pages = PageAtCheckpoints(run_dir, start=partial(start_page, run_dir), announce=console.log)

    def look_after_others() -> None:
        if supervisor is not None:
            supervisor.check()
        if pages is not None:
            pages.look()

    try:
        if config.rollout.servers:
            pool = ServerPool.launch(
                server_settings(config, first_gpu=config.world_size),  # the ranks take the first devices, one each
                num_servers=config.rollout.servers,
                log_dir=run_dir / "logs",
                base_port=config.rollout.base_port,
            )
        ranks = start_workers(config, "train", preloaded=preloaded)
        if pool is not None:
            pool.wait_until_ready(
                config.rollout.start_timeout_s, should_abort=partial(_check_while_starting, pool, ranks, console, ctrl_c, run_dir)
            )
            console.remark("")
            check_pool(pool)
        endpoints = list(config.rollout.endpoints) if pool is None else pool.endpoints
        write_atomically(run_dir / ENDPOINTS_FILE, json.dumps(endpoints) + "\n")
        if pool is not None:
            supervisor = supervise(config, pool, announce=console.log)
        _watch(ranks, console, look_after_others, ctrl_c, run_dir, stop_gently=True)
    finally:
        if pages is not None:
            pages.close()
        if supervisor is not None:
            supervisor.close()
        if ranks is not None:
            ranks.terminate()
        if pool is not None:
            pool.stop()


def _check_while_starting(pool: ServerPool, ranks: ManagedProcess, console: Console, ctrl_c: CtrlC, run_dir: Path) -> None:
    """Raises Interrupted after Ctrl-C, RuntimeError when the ranks have ended: then there is no need to wait for servers."""
    console.refresh()
    console.remark(f"{pool.num_ready} of {len(pool.endpoints)} servers answer")
    _refuse_to_begin(ctrl_c)
    if not ranks.is_running:
        raise _rank_failure(ranks, run_dir)


def _refuse_to_begin(ctrl_c: CtrlC) -> None:
    if ctrl_c.times:  # nothing is trained yet, so at once
        raise Interrupted("interrupted before training began")


def _rank_failure(ranks: ManagedProcess, run_dir: Path) -> RuntimeError:
    """What the first failing rank wrote down, or else the last words in the log."""
    error = run_dir / ERROR_FILE
    reason = error.read_text(encoding="utf-8").strip() if error.exists() else ranks.describe_end()
    full = f"; the disk that holds {run_dir} is full" if shutil.disk_usage(run_dir).free < _FULL_DISK_BYTES else ""
    return RuntimeError(f"a trainer rank failed: {reason}{full}")


def _watch(
    ranks: ManagedProcess, console: Console, look_after_others: Callable[[], None], ctrl_c: CtrlC, run_dir: Path, *, stop_gently: bool
) -> None:
    """Until the ranks end. Raises RuntimeError with the first error of a rank, ServerDied, or Interrupted."""
    asked = False
    while ranks.is_running:
        console.refresh()
        look_after_others()
        if not stop_gently:
            _refuse_to_begin(ctrl_c)
        if ctrl_c.times > 1:
            raise Interrupted("interrupted at once; the last checkpoint is kept")
        if ctrl_c.times and not asked:
            (run_dir / STOP_FILE).touch()
            console.log("stopping with a checkpoint (Ctrl-C again: at once, without)")
            asked = True
        time.sleep(_REFRESH_S)
    console.refresh()
    if ranks.exit_code != 0:
        raise _rank_failure(ranks, run_dir)
