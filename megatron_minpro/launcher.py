"""`minpro train` on one machine: the run folder, the base model, servers and trainer ranks as child processes, the console, the end.

Everything that computes happens in children; this process starts them, watches them and leaves none behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from checkpoints_convert.hf_config import Architecture, read_architecture
from megatron_minpro import base_model, plots, summary
from megatron_minpro.atomic_files import write_atomically
from megatron_minpro.config import RunConfig, dump_config, flatten_differences, load_config
from megatron_minpro.console import Console
from megatron_minpro.run_state import latest_checkpoint
from megatron_minpro.serving import server_settings
from megatron_minpro.tracking import METRICS_FILE, Progress, read_metrics, write_progress
from megatron_minpro.worker import (
    CONFIG_FILE,
    ENDPOINTS_FILE,
    ERROR_FILE,
    EXPORT_FOLDER,
    INITIAL_MODEL_FOLDER,
    RESULT_FILE,
    STOP_FILE,
)
from parallel.capabilities import detect
from rollout.processes import ManagedProcess, spawn
from rollout.server import ServerPool

_REFRESH_S = 0.3
# What may differ between attempts at one run.
_FREE_TO_CHANGE = (
    "checkpoint.",
    "tracking.",
    "rollout.base_port",
    "rollout.start_timeout_s",
    "rollout.request_timeout_s",
    "debug.check_weights",
)


class Interrupted(RuntimeError):
    """Ctrl-C: the run stopped with a checkpoint (or, asked twice, at once)."""


def run(config: RunConfig, *, resume: str) -> Path:
    """Train to the end and return the run folder. resume: auto | never | must.

    Raises ValueError for input that cannot work, before anything starts; RuntimeError when a rank or a server fails, with its last
    words; Interrupted after Ctrl-C. Whatever happens, no child survives.
    """
    check(config)
    run_dir = config.run_dir
    resumed = prepare_run_folder(config, resume=resume)
    started = time.monotonic()
    with Console(run_dir, num_global_steps=config.num_global_steps, name=config.name, resumed_from=resumed) as console, _CtrlC() as ctrl_c:
        seconds = {"base_model": ensure_base_model(config, console, ctrl_c)}
        seconds["train_and_servers"] = _train(config, console, ctrl_c)
    result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    if not result["complete"]:
        raise Interrupted(f"stopped after {result['trained_batches']} trained batches with a checkpoint; the same command continues")
    text = finish(config, {**result["seconds"], **seconds, "total": time.monotonic() - started})
    console.log(text)
    return run_dir


def check(config: RunConfig) -> Architecture | None:
    """Raises ValueError for what can be known to be wrong before a process starts. The model's architecture, None before it is made."""
    folder = Path(config.model.path)
    architecture = None
    if folder.exists():
        architecture = read_architecture(folder)
        base_model.check_recipe(config.model, config.prompts)
    elif config.model.warm_up is None:
        raise ValueError(f"model.path: {folder} does not exist and model.warm_up is null; expected a Hugging Face model folder")
    elif "vocab_size" in config.model.warm_up.architecture:
        architecture = Architecture.from_config(config.model.warm_up.architecture, source="model.warm_up.architecture")
    if architecture is not None:
        config.layout.check_model(architecture)
    return architecture


def prepare_run_folder(config: RunConfig, *, resume: str) -> int | None:
    """Make the run folder, or accept one that a former attempt left. The last global step already done, None for a fresh run.

    Raises ValueError when `resume` and the folder disagree, or when it belongs to another configuration (the differences are named).
    """
    run_dir = config.run_dir
    written = run_dir / CONFIG_FILE
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if written.exists():
        if resume == "never":
            raise ValueError(f"{run_dir}: holds a run already; expected a new name=... with --resume never")
        differences = {
            key: values
            for key, values in flatten_differences(load_config(written, []), config).items()
            if not key.startswith(_FREE_TO_CHANGE)
        }
        if differences:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(differences.items())[:5])
            raise ValueError(f"{run_dir}: holds a run with another configuration ({shown}); expected a new name=... or the same settings")
    if resume == "must" and checkpoint is None:
        raise ValueError(f"{run_dir}: has no checkpoint to resume from; expected one with --resume must")
    run_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        for name in ("evaluation_before.json", METRICS_FILE):
            (run_dir / name).unlink(missing_ok=True)  # of an attempt that ended before its first checkpoint
        for name in ("tensorboard", "rollouts"):
            shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in (STOP_FILE, ENDPOINTS_FILE, ERROR_FILE, RESULT_FILE, "progress.json"):
        (run_dir / name).unlink(missing_ok=True)
    write_atomically(written, dump_config(config))
    if checkpoint is None:
        return None
    return json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))["counters"]["next_step"] - 1


def ensure_base_model(config: RunConfig, console: Console, ctrl_c: _CtrlC) -> float:
    """Make model.path when it does not exist. Seconds it took."""
    start = time.monotonic()
    if Path(config.model.path).exists():
        return 0.0
    assert config.model.warm_up is not None
    run_dir = config.run_dir
    destination = Path(config.model.path) if config.model.warm_up.num_steps == 0 else run_dir / INITIAL_MODEL_FOLDER
    if destination != Path(config.model.path):
        shutil.rmtree(destination, ignore_errors=True)
    base_model.write_initial_model(config.model, config.prompts, destination)
    config.layout.check_model(read_architecture(destination))
    if config.model.warm_up.num_steps:
        write_progress(run_dir, Progress(phase="base model", global_step=0, detail="starting"))
        ranks = start_ranks(config, "warm_up")
        try:
            _watch(ranks, console, lambda: None, ctrl_c, run_dir, stop_gently=False)
        finally:
            ranks.terminate()
    return time.monotonic() - start


def start_ranks(config: RunConfig, task: str) -> ManagedProcess:
    """torchrun with one process per rank on this machine."""
    run_dir = config.run_dir
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.world_size}"]
    command += ["-m", "megatron_minpro.worker", str(run_dir), task]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    # torchrun itself would die of the signal that asks its workers to stop.
    return spawn(
        command, log_path=run_dir / "logs" / f"{task}.log", env=environment, name=f"trainer ({task})", ignore_signals=(signal.SIGUSR1,)
    )


def _train(config: RunConfig, console: Console, ctrl_c: _CtrlC) -> float:
    start = time.monotonic()
    run_dir = config.run_dir
    write_progress(run_dir, Progress(phase="starting servers and ranks", global_step=0))
    pool = None
    ranks = None
    try:
        if config.rollout.servers:
            pool = ServerPool.launch(
                server_settings(config), num_servers=config.rollout.servers, log_dir=run_dir / "logs", base_port=config.rollout.base_port
            )
        ranks = start_ranks(config, "train")
        if pool is not None:
            pool.wait_until_ready(config.rollout.start_timeout_s)
        endpoints = list(config.rollout.endpoints) if pool is None else pool.endpoints
        write_atomically(run_dir / ENDPOINTS_FILE, json.dumps(endpoints) + "\n")
        _watch(ranks, console, pool.check if pool is not None else lambda: None, ctrl_c, run_dir, stop_gently=True)
    finally:
        if ranks is not None:
            ranks.terminate()
        if pool is not None:
            pool.stop()
    return time.monotonic() - start


def _watch(
    ranks: ManagedProcess, console: Console, check_servers: Callable[[], None], ctrl_c: _CtrlC, run_dir: Path, *, stop_gently: bool
) -> None:
    """Until the ranks end. Raises RuntimeError with the first error of a rank, ServerDied, or Interrupted."""
    asked = False
    while ranks.is_running:
        console.refresh()
        check_servers()
        if ctrl_c.times and not stop_gently:
            raise Interrupted("interrupted before training began")
        if ctrl_c.times > 1:
            raise Interrupted("interrupted at once; the last checkpoint is kept")
        if ctrl_c.times and not asked:
            (run_dir / STOP_FILE).touch()
            console.log("stopping after this global step, with a checkpoint (Ctrl-C again: at once)")
            asked = True
        time.sleep(_REFRESH_S)
    console.refresh()
    if ranks.exit_code != 0:
        error = run_dir / ERROR_FILE
        reason = error.read_text(encoding="utf-8").strip() if error.exists() else ranks.describe_end()
        raise RuntimeError(f"a trainer rank failed: {reason}")


def finish(config: RunConfig, seconds: dict[str, float]) -> str:
    """summary.json and the plots of a complete run; the paragraph to print."""
    run_dir = config.run_dir
    result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    metrics = list(read_metrics(run_dir / METRICS_FILE))
    measured = {}
    for label in ("before", "after"):
        content = json.loads((run_dir / f"evaluation_{label}.json").read_text(encoding="utf-8"))
        measured[label] = {name: value for name, value in content.items() if name.startswith("pass_at_")}
    built = summary.build_summary(
        metrics,
        staleness=config.staleness,
        updates=result["policy_version"],
        rollouts_sampled=result["rollouts_sampled"],
        rollouts_trained=result["rollouts_trained"],
        rollouts_lost=result["rollouts_sampled"] - result["rollouts_trained"],
        seconds=seconds,
        evaluation_before=measured["before"],
        evaluation_after=measured["after"],
    )
    summary.write_summary(run_dir, built)
    title = f"{config.name}: {config.objective.name}, staleness {config.staleness}"
    plots.plot_run(run_dir, metrics, title=title, evaluation_before=measured["before"], evaluation_after=measured["after"])
    return summary.paragraph(built, name=config.name, objective=config.objective.name, staleness=config.staleness, run_dir=run_dir)


def describe(config: RunConfig) -> RenderableType:
    """What `minpro train --dry-run` shows: the resolved configuration, every rank's place, the processes that would start."""
    architecture = describe_architecture(config)
    layout = config.layout
    ranks = Table(title=f"{layout.world_size} trainer ranks", title_justify="left")
    for name in ("rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp"):
        ranks.add_column(name, justify="right")
    shown = [*range(min(layout.world_size, 16))]
    for rank in shown:
        place = layout.coordinates(rank)
        ranks.add_row(*(str(getattr(place, name)) for name in ("rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp")))
    if layout.world_size > len(shown):
        ranks.add_row("...", *[""] * 7)
    processes = Table(title="processes", title_justify="left", show_header=False)
    processes.add_row(f"{config.world_size} x", f"torchrun -m megatron_minpro.worker {config.run_dir} train")
    if config.rollout.servers:
        processes.add_row(
            f"{config.rollout.servers} x", f"SGLang server of {config.model.path}, tp {config.rollout.tp}, {config.rollout.dtype}"
        )
    for endpoint in config.rollout.endpoints:
        processes.add_row("1 x", f"SGLang server at {endpoint} (started elsewhere)")
    steps = config.num_global_steps
    facts = [
        *detect().lines(),
        architecture,
        f"{steps} global steps x {config.actor.updates_per_step} updates of {config.sequences_per_mini_batch} responses; "
        f"{config.rollout.prompts_per_step} prompts x {config.rollout.group_size} responses a step; "
        f"staleness {config.staleness}: policy lag {config.actor.updates_per_step * config.staleness} to "
        f"{config.actor.updates_per_step * (config.staleness + 1) - 1} updates",
        f"run folder {config.run_dir}; the policy would be exported to {config.run_dir / EXPORT_FOLDER}",
    ]
    return Group(Syntax(dump_config(config), "yaml", background_color="default"), ranks, processes, *(Text(fact) for fact in facts))


def describe_architecture(config: RunConfig) -> str:
    """One line about the model. Raises ValueError when the layout cannot hold it."""
    folder = Path(config.model.path)
    if folder.exists() or config.model.warm_up is not None:
        architecture = check(config)
        if architecture is None:
            return f"model {folder}: to be made ({config.model.warm_up.num_steps if config.model.warm_up else 0} supervised steps)"
        experts = f"{architecture.num_experts} experts" if architecture.num_experts else "dense"
        return f"model {folder}: {architecture.num_hidden_layers} layers of {architecture.hidden_size}, {experts}"
    return f"model {folder}: not on this machine, so its shape and the layout's fit are not checked"


class _CtrlC:
    """Counts SIGINT and SIGTERM instead of dying of them."""

    def __init__(self) -> None:
        self.times = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> _CtrlC:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.times += 1
