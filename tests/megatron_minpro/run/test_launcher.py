"""What the launcher decides before any process starts: is the run folder ours to continue, and what of it is stale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.run import launcher

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny(tmp_path)


def tiny(folder: Path, *overrides: str) -> RunConfig:
    paths = [f"output_dir={folder}/runs", f"model.path={folder}/model", "name=test", "staleness=2"]
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*paths, *overrides])


def add_checkpoint(
    config: RunConfig, next_step: int, *, cursor: Mapping[str, Any] = MappingProxyType({}), model: Mapping[str, Any] = MappingProxyType({})
) -> None:
    name = f"step_{next_step:06d}"
    folder = config.run_dir / "checkpoints"
    (folder / name).mkdir(parents=True)
    counters = {**asdict(RunCounters()), "next_step": next_step}
    state = {
        "config": config.model_dump(mode="json"),
        "counters": counters,
        "policy_version": 0,
        "cursor": dict(cursor),
        "waiting": [],
        "unfinished": None,
        "kept_version": None,
        "files": {},
        "model": dict(model),
    }
    (folder / name / "run.json").write_text(json.dumps(state))
    (folder / "latest").write_text(name)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_fresh_run_folder_holds_the_resolved_configuration(config: RunConfig, resume: str) -> None:
    assert launcher.prepare_run_folder(config, resume=resume) is None
    assert load_config(config.run_dir / "config.yaml") == config


def test_a_run_with_a_checkpoint_is_continued_after_its_last_step(config: RunConfig) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    add_checkpoint(config, 20)
    assert launcher.prepare_run_folder(config, resume="auto") == 19
    assert launcher.prepare_run_folder(config, resume="must") == 19


def test_never_refuses_a_folder_that_holds_a_run(config: RunConfig) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    with pytest.raises(ValueError, match=r"test: holds a run already; expected a new name=\.\.\. with --resume never$"):
        launcher.prepare_run_folder(config, resume="never")


def test_never_refuses_a_checkpoint_even_where_the_configuration_is_lost(config: RunConfig) -> None:
    add_checkpoint(config, 20)
    with pytest.raises(ValueError, match="test: holds a run already"):
        launcher.prepare_run_folder(config, resume="never")


def test_must_refuses_a_folder_without_a_checkpoint(config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"test: has no checkpoint to resume from; expected one with --resume must$"):
        launcher.prepare_run_folder(config, resume="must")
    assert not config.run_dir.exists()


def test_a_checkpoint_is_continued_by_its_own_configuration_alone(config: RunConfig, tmp_path: Path) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    add_checkpoint(config, 20)
    with pytest.raises(ValueError, match=r"step_000020: of a run with another configuration \(staleness: 2 there, 4 here\)"):
        launcher.prepare_run_folder(tiny(tmp_path, "staleness=4"), resume="auto")
    assert load_config(config.run_dir / "config.yaml") == config, "the folder's own configuration is untouched"
    changed = tiny(tmp_path, "checkpoint.every=3")
    assert launcher.prepare_run_folder(changed, resume="auto") == 19
    assert load_config(config.run_dir / "config.yaml") == changed


def test_a_folder_without_a_checkpoint_can_start_anew_with_other_settings(config: RunConfig, tmp_path: Path) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    other = tiny(tmp_path, "staleness=4")
    assert launcher.prepare_run_folder(other, resume="auto") is None
    assert load_config(config.run_dir / "config.yaml") == other


SIGNALS = ("stop", "endpoints.json", "error.txt", "result.json", "progress.json")
RESULTS = ("metrics.jsonl", "versions.jsonl", "evaluation_before.json", "evaluation_step_000004.json", "evaluation_after.json")


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_what_an_earlier_attempt_left_is_kept_exactly_when_it_is_continued(config: RunConfig, has_checkpoint: bool) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    run_dir = config.run_dir
    for name in (*SIGNALS, *RESULTS, "tensorboard/events", "rollouts/step_000000.jsonl", "logs/train.log"):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("{}")
    if has_checkpoint:
        add_checkpoint(config, 10)
    launcher.prepare_run_folder(config, resume="auto")
    assert [name for name in SIGNALS if (run_dir / name).exists()] == []
    for name in (*RESULTS, "tensorboard", "rollouts"):
        assert (run_dir / name).exists() is has_checkpoint, name
    assert (run_dir / "logs/train.log").exists()


def test_what_attempts_before_the_first_checkpoint_sampled_counts_as_lost(config: RunConfig) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    metrics, lost = config.run_dir / "metrics.jsonl", config.run_dir / "rollouts_lost.json"
    metrics.write_text('{"global_step": 0, "total/rollouts_sampled": 32}\n{"global_step": 1, "total/rollouts_sampled": 64}\n')
    launcher.prepare_run_folder(config, resume="auto")
    assert (metrics.exists(), lost.read_text()) == (False, "64\n")
    launcher.prepare_run_folder(config, resume="auto")
    assert lost.read_text() == "64\n", "an attempt that finished no step sampled nothing that is known of"
    metrics.write_text('{"global_step": 0, "total/rollouts_sampled": 96}\n')  # its counters began with the 64
    launcher.prepare_run_folder(config, resume="auto")
    assert lost.read_text() == "96\n"
    sampled = config.run_dir / "rollouts_sampled.json"
    sampled.write_text("128\n")  # a batch arrived, and its step never ended
    launcher.prepare_run_folder(config, resume="auto")
    assert (lost.read_text(), sampled.exists()) == ("128\n", False)


def test_a_checkpoint_pointer_at_nothing_is_refused_first(config: RunConfig) -> None:
    launcher.prepare_run_folder(config, resume="auto")
    (config.run_dir / "metrics.jsonl").write_text("{}")
    (config.run_dir / "checkpoints").mkdir()
    (config.run_dir / "checkpoints/latest").write_text("step_000010")
    with pytest.raises(ValueError, match=r"latest: names 'step_000010', which holds no run\.json"):
        launcher.prepare_run_folder(config, resume="auto")
    assert (config.run_dir / "metrics.jsonl").exists()


def test_a_run_folder_has_one_owner_at_a_time(config: RunConfig) -> None:
    with launcher._ownership(config.run_dir):
        with (
            pytest.raises(ValueError, match=r"test: is being trained by another process; expected a new name=\.\.\.$"),
            launcher._ownership(config.run_dir),
        ):
            raise AssertionError("owned twice")
        assert config.run_dir.exists()
    with launcher._ownership(config.run_dir):
        pass


def test_refused_input_leaves_no_folder_but_never_removes_one(config: RunConfig) -> None:
    def refused() -> None:
        with pytest.raises(ValueError, match="wrong input"), launcher._ownership(config.run_dir):
            raise ValueError("wrong input")

    refused()
    assert not config.run_dir.exists()
    launcher.prepare_run_folder(config, resume="auto")
    refused()
    assert (config.run_dir / "config.yaml").exists()
