"""Cells become rows: collected, failed, interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_minpro.config import RunConfig, dump_config
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.rows import Row, read_rows
from megatron_minpro.study.running import Interrupted, check_folders, collect, make_base_models, run_cells
from tests.megatron_minpro.study.test_rows import write_run


def run(cells: Sequence[Cell], folder: Path, *, jobs: int = 1, stop_file: Path | None = None) -> list[str]:
    """Run cells as forks of this process; what was said."""
    said: list[str] = []

    def ended(row: Row) -> None:
        said.append(f"{row.cell}: {row.status}")

    run_cells(
        cells,
        folder=folder,
        jobs=jobs,
        delete_runs=False,
        preloaded=True,
        place=lambda config: config,
        watch=lambda _: None,
        stop_file=stop_file,
        ended=ended,
        say=said.append,
    )
    return said


def random_model(config: RunConfig) -> RunConfig:
    """The base model is made without training."""
    assert config.model.warm_up is not None
    warm_up = config.model.warm_up.model_copy(update={"num_steps": 0})
    return config.model_copy(update={"model": config.model.model_copy(update={"warm_up": warm_up})})


def test_a_complete_run_becomes_a_row_without_running(cells: dict[str, Cell], tmp_path: Path) -> None:
    first, second = list(cells.values())[:2]
    write_run(first)
    write_run(second, complete=False)
    assert [row.cell for row in collect([first, second], tmp_path)] == [first.name]
    assert list(read_rows(tmp_path)) == [first.name]


def test_a_complete_run_of_another_configuration_is_refused(cells: dict[str, Cell], tmp_path: Path) -> None:
    cell, other = cells["grpo_staleness2_seed1"], cells["grpo_staleness2_seed2"]
    write_run(cell)
    path = cell.config.run_dir / "config.yaml"
    path.write_text(dump_config(other.config))
    with pytest.raises(ValueError, match=r"config\.yaml: a complete run of another configuration; expected that of grpo_staleness2_seed1"):
        collect([cell], tmp_path)
    assert read_rows(tmp_path) == {}


def test_a_checkpoint_of_another_configuration_is_refused(cells: dict[str, Cell]) -> None:
    cell, other = cells["grpo_staleness2_seed1"], cells["grpo_staleness2_seed2"]
    checkpoint = cell.config.run_dir / "checkpoints/step_000002"
    checkpoint.mkdir(parents=True)
    state = {"config": other.config.model_dump(mode="json")}
    (checkpoint / "run.json").write_text(json.dumps(state))
    (checkpoint.parent / "latest").write_text("step_000002")
    with pytest.raises(ValueError) as caught:
        check_folders([cell])
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)


def test_a_cell_that_cannot_run_is_a_row_and_the_next_one_runs(cells: dict[str, Cell], tmp_path: Path) -> None:
    first, second = cells["grpo_staleness0_seed1"], cells["grpo_staleness2_seed1"]
    locks = []
    for cell in (first, second):  # as if another process trained them
        cell.config.run_dir.mkdir(parents=True)
        locks.append((cell.config.run_dir / "lock").open("w"))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)
    folder = tmp_path / "studies"
    assert sorted(run([first, second], folder, jobs=2)) == [f"{first.name}: failed", f"{second.name}: failed"]
    rows = read_rows(folder)
    log = folder / f"logs/{first.name}.log"
    said = f"{first.config.run_dir}: is being trained by another process; expected a new name=... (exit code 2; log: {log})"
    assert (rows[first.name].error, rows[second.name].status) == (said, "failed")


def test_an_interrupted_cell_has_no_row_and_leaves_nothing(cells: dict[str, Cell], tmp_path: Path) -> None:
    cell = cells["grpo_staleness0_seed1"]

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not (cell.config.run_dir / "progress.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(Interrupted, match="the same command continues"):
            run([cell, cells["grpo_staleness2_seed1"]], tmp_path)
    finally:
        thread.join()
    assert read_rows(tmp_path) == {}
    assert "interrupted before training began" in (tmp_path / f"logs/{cell.name}.log").read_text()
    assert not cells["grpo_staleness2_seed1"].config.run_dir.exists()


def test_nothing_starts_once_the_stop_file_is_there(cells: dict[str, Cell], tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    stop.touch()
    with pytest.raises(Interrupted):
        run(list(cells.values()), tmp_path / "studies", stop_file=stop)
    assert not (tmp_path / "studies/logs").exists()


def test_base_models_are_made_once_before_the_cells(cells: dict[str, Cell], tmp_path: Path) -> None:
    configs = [random_model(cell.config) for cell in cells.values()]
    make_base_models(configs, folder=tmp_path / "studies", preloaded=True)
    model = Path(configs[0].model.path)
    assert (model / "model.safetensors").is_file()
    log = tmp_path / "studies/logs/base_model.log"
    log.unlink()
    make_base_models(configs, folder=tmp_path / "studies", preloaded=True)
    assert not log.exists()  # no process was started again
    assert sorted(path.name for path in (tmp_path / "studies/cells").iterdir()) == ["base_model.yaml"]


def test_a_base_model_that_cannot_be_made_ends_the_study(cells: dict[str, Cell], tmp_path: Path) -> None:
    config = random_model(next(iter(cells.values())).config)
    Path(config.model.path).parent.mkdir(parents=True)
    shutil.rmtree(Path(config.model.path).parent)
    Path(config.model.path).parent.write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"base_models.*\(exit code [12]; log: .*base_model\.log\)"):
        make_base_models([config], folder=tmp_path / "studies", preloaded=True)
