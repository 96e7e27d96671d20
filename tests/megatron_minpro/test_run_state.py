"""Saving and loading a run: nothing changes on the way, nothing is half-written, old checkpoints go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_minpro import run_state
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.run_state import RunCounters, latest_checkpoint
from megatron_minpro.samples import RolloutBatch

MakeBatch = Callable[..., RolloutBatch]
REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = ("staleness=2", "objective={name: minpro, clip_high: 4.0}")
CONFIG = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", SETTINGS)


class FakeActor:
    """Keeps one file, as the border to Megatron's checkpoints."""

    def __init__(self, policy_version: int = 0, *, failure: Exception | None = None) -> None:
        self.policy_version = policy_version
        self.failure = failure

    def save(self, directory: Path) -> None:
        assert list(directory.iterdir()) == []
        (directory / "weights").write_text(str(self.policy_version))
        if self.failure is not None:
            raise self.failure

    def load(self, directory: Path, *, policy_version: int) -> None:
        if self.failure is not None:
            raise self.failure
        assert (directory / "weights").read_text() == str(policy_version)
        self.policy_version = policy_version


def config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*SETTINGS, *overrides])


def load(checkpoint: Path, *, actor: FakeActor | None = None, config: RunConfig = CONFIG) -> run_state.SavedRun:
    return run_state.load(checkpoint, actor=actor or FakeActor(), config=config)  # type: ignore[arg-type]


def save(directory: Path, step: int, *, actor: FakeActor | None = None, waiting: tuple = (), keep: int = 2) -> Path:
    directory.mkdir(exist_ok=True)
    return run_state.save(
        directory,
        actor=actor or FakeActor(16 * step),  # type: ignore[arg-type]
        config=CONFIG,
        counters=RunCounters(next_step=step, trained_batches=step - 1, seconds={"sample": 0.1}),
        cursor={"epoch": 1, "position": 7},
        waiting=waiting,
        keep=keep,
    )


def awkward_batch(make_batch: MakeBatch, step: int) -> RolloutBatch:
    """Numbers that no float32 holds, the largest token id, samples of different lengths."""
    batch = make_batch(step, version=16 * step)
    numbers = (-0.1, -math.pi, -1e-300, -745.2, -1 / 3)
    samples = [
        replace(
            sample,
            token_ids=(151_935, 0, 2, *range(n + 1)),
            engine_logprobs=tuple(numbers[: n + 1]),
            behaviour_logprobs=tuple(x / 7 for x in numbers[: n + 1]),
            advantage=0.1 * n - 1 / 3,
            reward=0.7,
        )
        for n, sample in enumerate(batch.samples)
    ]
    return replace(batch, samples=tuple(samples))


def test_a_saved_run_comes_back_bit_for_bit(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path) -> None:
    waiting = (awkward_batch(make_batch, 3), awkward_batch(make_batch, 4))
    path = save(tmp_path / "checkpoints", 5, waiting=waiting)
    assert path == tmp_path / "checkpoints/step_000005"
    assert latest_checkpoint(tmp_path / "checkpoints") == path
    actor = FakeActor()
    found = load(path, actor=actor)
    assert actor.policy_version == 80
    assert found.counters == RunCounters(next_step=5, trained_batches=4, seconds={"sample": 0.1})
    assert found.cursor == {"epoch": 1, "position": 7}
    assert found.waiting == waiting  # == on floats: every bit
    assert all(type(value) is int for batch in found.waiting for sample in batch.samples for value in sample.token_ids)


def test_correction_weights_come_back_bit_for_bit_or_not_at_all(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    plain = awkward_batch(make_batch, 3)
    samples = [replace(sample, correction_weights=sample.engine_logprobs) for sample in awkward_batch(make_batch, 4).samples]
    waiting = (plain, replace(awkward_batch(make_batch, 4), samples=tuple(samples)))
    assert load(save(tmp_path / "checkpoints", 5, waiting=waiting)).waiting == waiting


def test_a_run_without_waiting_batches_comes_back_empty(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    assert load(save(tmp_path / "checkpoints", 1)).waiting == ()


def test_a_waiting_batch_without_behaviour_logprobs_is_refused_and_leaves_no_checkpoint(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    batch = make_batch(0)
    unscored = replace(batch, samples=(*batch.samples[:-1], replace(batch.samples[-1], behaviour_logprobs=None)))
    with pytest.raises(ValueError, match=r"^sample-3: behaviour_logprobs are missing from a batch that waits$"):
        save(tmp_path / "checkpoints", 1, waiting=(unscored,))
    assert latest_checkpoint(tmp_path / "checkpoints") is None
    assert not (tmp_path / "checkpoints/step_000001").exists()


def test_a_failure_while_saving_keeps_the_earlier_checkpoint(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    earlier = save(directory, 1)
    with pytest.raises(OSError, match="disk full"):
        save(directory, 2, actor=FakeActor(32, failure=OSError("disk full")))
    assert latest_checkpoint(directory) == earlier
    assert not (directory / "step_000002").exists()
    # What the failure left in its way does not stop the next attempt.
    assert latest_checkpoint(directory) != save(directory, 2)
    actor = FakeActor()
    load(directory / "step_000002", actor=actor)
    assert actor.policy_version == 32


@pytest.mark.parametrize(("keep", "left"), [(1, ["step_000004"]), (3, ["step_000002", "step_000003", "step_000004"])])
def test_only_the_newest_checkpoints_are_kept(one_rank_group: dist.ProcessGroup, tmp_path: Path, keep: int, left: list[str]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / "checkpoints", step, keep=keep)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", *left]


def test_the_same_step_can_be_saved_again(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1, actor=FakeActor(5))
    path = save(tmp_path / "checkpoints", 1, actor=FakeActor(6))
    actor = FakeActor()
    load(path, actor=actor)
    assert actor.policy_version == 6


def test_no_checkpoint_is_none_and_a_pointer_at_nothing_is_refused(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "latest").write_text("step_000007")
    with pytest.raises(ValueError, match=r"latest: names step_000007, which holds no run\.json$"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("change", [lambda state: state.pop("counters"), lambda state: state["counters"].update(unknown=1), None])
def test_a_foreign_run_json_is_refused_by_name(one_rank_group: dist.ProcessGroup, tmp_path: Path, change: Any) -> None:
    path = save(tmp_path / "checkpoints", 1)
    state = json.loads((path / "run.json").read_text())
    if change is not None:
        change(state)
    (path / "run.json").write_text(json.dumps(state) if change is not None else "{half")
    with pytest.raises(ValueError, match=r"run\.json: not a checkpoint of this program"):
        load(path)


def test_a_damaged_actor_checkpoint_is_refused_by_name(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    with pytest.raises(ValueError, match=r"step_000001/actor: cannot be loaded \(KeyError: 'no such tensor'\)$"):
        load(path, actor=FakeActor(failure=KeyError("no such tensor")))


def test_a_checkpoint_of_another_configuration_is_refused_with_the_keys_that_differ(
    one_rank_group: dist.ProcessGroup, tmp_path: Path
) -> None:
    path = save(tmp_path / "checkpoints", 1)
    for override, shown in (
        ("staleness=4", "staleness: 2 there, 4 here"),
        ("objective.clip_high=2.0", "objective.clip_high: 4.0 there, 2.0 here"),
    ):
        actor = FakeActor()
        with pytest.raises(ValueError) as refusal:
            load(path, actor=actor, config=config(override, "checkpoint.every=3"))
        assert str(refusal.value) == f"{path}: of a run with another configuration ({shown}); expected a new name=... or the same settings"
        assert actor.policy_version == 0, "nothing is loaded"


@pytest.mark.parametrize(
    "override",
    ["checkpoint.every=3", "world_size=4", "parallel.ep=1", "tracking.log_level=debug", "rollout.base_port=4000", "rollout.servers=2"],
)
def test_where_and_when_may_differ_between_attempts(one_rank_group: dist.ProcessGroup, tmp_path: Path, override: str) -> None:
    load(save(tmp_path / "checkpoints", 1), actor=FakeActor(), config=config(override))


def test_what_an_attempt_sampled_after_its_checkpoint_is_counted_as_lost() -> None:
    def resumed() -> RunCounters:
        """As every attempt reads them from the one checkpoint."""
        return RunCounters(rollouts_sampled=64, rollouts_trained=32)

    until_checkpoint = [{"global_step": 0, "rollouts_sampled": 32.0}, {"global_step": 1, "rollouts_sampled": 64.0}]
    counters = resumed()
    counters.count_lost(
        [*until_checkpoint, {"global_step": 2, "rollouts_sampled": 96.0}, {"global_step": 3, "rollouts_sampled": None}], recorded=0
    )
    assert (counters.rollouts_sampled, counters.rollouts_lost, counters.rollouts_trained) == (96, 32, 32)

    counters = resumed()  # that attempt ended before it wrote a line: its metrics were cut, its count was recorded
    counters.count_lost(until_checkpoint, recorded=32)
    assert (counters.rollouts_sampled, counters.rollouts_lost) == (96, 32)

    counters = resumed()  # this one sampled two batches (64 + 32 lost + 64) and was killed as well
    counters.count_lost([*until_checkpoint, {"global_step": 3, "rollouts_sampled": 160.0}], recorded=32)
    assert (counters.rollouts_sampled, counters.rollouts_lost) == (160, 96)
