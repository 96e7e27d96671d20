"""Saving and loading a run: nothing changes on the way, nothing is half-written, old checkpoints go."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop.counters import BatchState, RunCounters, StepSeconds, UnfinishedStep
from megatron_minpro.run import run_state
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from megatron_minpro.run.run_state import latest_checkpoint
from megatron_minpro.run.worker import count_lost
from megatron_minpro.tracking.sampled_count import write_sampled
from parallel.actor_checkpoint import Captured
from rollout.records import VersionSpan
from tests.megatron_minpro.conftest import content

MakeBatch = Callable[..., RolloutBatch]
REPOSITORY = Path(__file__).resolve().parents[3]
SETTINGS = ("staleness=2", "objective={name: minpro, clip_high: 4.0}", "model.path=absent")
CONFIG = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", SETTINGS)


assert CONFIG.model.warm_up is not None
MODEL: dict[str, Any] = CONFIG.model.warm_up.architecture | {"vocab_size": 32}


class FakeActor:
    """Keeps one file, as the border to Megatron's checkpoints. Writing waits for `may_write`."""

    def __init__(self, policy_version: int = 0, *, failure: Exception | None = None) -> None:
        self.policy_version = policy_version
        self.kept_version: int | None = None
        self.kept_place = ""
        self.architecture = Architecture.from_config(MODEL, source="test")
        self.failure = failure
        self.may_write = Event()
        self.may_write.set()

    def capture(self, directory: Path) -> Captured:
        version = self.policy_version

        def write(group: dist.ProcessGroup) -> None:
            assert list(directory.iterdir()) == []
            assert self.may_write.wait(timeout=20)
            (directory / "weights").write_text(str(version))
            if self.failure is not None:
                raise self.failure

        return Captured(num_bytes=1000, write=write)

    def capture_kept(self, directory: Path) -> Captured:
        kept = self.kept_version

        def write(group: dist.ProcessGroup) -> None:
            (directory / "weights").write_text(str(kept))

        return Captured(num_bytes=1000, write=write)

    def load_kept(self, directory: Path, *, policy_version: int, place: str) -> None:
        assert (directory / "weights").read_text() == str(policy_version)
        self.kept_version, self.kept_place = policy_version, place

    def load(self, directory: Path, *, policy_version: int) -> None:
        if self.failure is not None:
            raise self.failure
        assert (directory / "weights").read_text() == str(policy_version)
        self.policy_version = policy_version


def config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*SETTINGS, *overrides])


def load(checkpoint: Path, *, actor: FakeActor | None = None, config: RunConfig = CONFIG) -> run_state.SavedRun:
    return run_state.load(checkpoint, actor=actor or FakeActor(), config=config)  # type: ignore[arg-type]


def writer(directory: Path, group: dist.ProcessGroup, *, keep: int = 2) -> CheckpointWriter:
    return CheckpointWriter(directory, run_dir=directory.parent, keep=keep, control_group=group, saving_group=group)


def begin(writer: CheckpointWriter, step: int, *, actor: FakeActor | None = None, waiting: tuple = ()) -> None:
    writer.save(
        actor=actor or FakeActor(16 * step),  # type: ignore[arg-type]
        config=CONFIG,
        counters=RunCounters(next_step=step, trained_batches=step - 1, seconds={"sample": 0.1}),
        cursor={"epoch": 1, "position": 7},
        waiting=waiting,
    )


def save(directory: Path, step: int, *, actor: FakeActor | None = None, waiting: tuple = (), keep: int = 2) -> Path:
    """Begin and wait."""
    assert dist.group.WORLD is not None
    one = writer(directory, dist.group.WORLD, keep=keep)
    begin(one, step, actor=actor, waiting=waiting)
    one.wait()
    return directory / f"step_{step:06d}"


def awkward_batch(make_batch: MakeBatch, step: int) -> RolloutBatch:
    """Numbers at the ends of float32, the largest token id, samples of different lengths."""
    batch = make_batch(step, version=16 * step)
    numbers = torch.tensor([-0.1, -math.pi, -1e-45, -745.2, -1 / 3])
    samples = [
        replace(
            sample,
            token_ids=torch.tensor((151_935, 0, 2, *range(n + 1)), dtype=torch.int32),
            loss_mask=torch.tensor([False] * 3 + [True] * (n + 1)),
            version_spans=(VersionSpan(policy_version=16 * step, start=0, end=n + 1),),
            engine_logprobs=numbers[: n + 1],
            behaviour_logprobs=numbers[: n + 1] / 7,
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
    assert content(found.waiting) == content(waiting)
    assert all(type(value) is tuple for batch in found.waiting for sample in batch.samples for value in [sample.version_spans])


def test_correction_weights_come_back_bit_for_bit_or_not_at_all(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    plain = awkward_batch(make_batch, 3)
    samples = [replace(sample, correction_weights=sample.engine_logprobs) for sample in awkward_batch(make_batch, 4).samples]
    waiting = (plain, replace(awkward_batch(make_batch, 4), samples=tuple(samples)))
    assert content(load(save(tmp_path / "checkpoints", 5, waiting=waiting)).waiting) == content(waiting)


def unfinished_step(updates: int, batch: BatchState) -> UnfinishedStep:
    """Numbers that a way through a file may change."""
    reports: list[dict[str, Any]] = [
        {
            "loss": 1 / 3,
            "grad_norm": 1e-45,
            "learning_rate": 1e-6,
            "policy_version": 48 + n,
            "num_tokens": 7,
            "metrics": {"ratio": [0.1, n]},
        }
        for n in range(updates)
    ]
    return UnfinishedStep(
        batch=batch,
        updates=updates,
        lags=tuple(range(updates)),
        reports=tuple(reports),
        metrics={"loss/total": 1 / 3, "rollout/tokens": 12},
        seconds=StepSeconds(phases={"update": 0.1}, scored_before=0.2, wall=0.7),
    )


def save_inside(directory: Path, group: dist.ProcessGroup, step: int, unfinished: UnfinishedStep, *, keep: int = 9) -> Path:
    actor = FakeActor(48)
    actor.kept_version = 32
    one = writer(directory, group, keep=keep)
    one.save(
        actor=actor,  # type: ignore[arg-type]
        config=CONFIG,
        counters=RunCounters(next_step=step, trained_batches=2),
        cursor={"epoch": 1, "position": 7},
        waiting=(),
        unfinished=unfinished,
    )
    one.wait()
    latest = run_state.latest_checkpoint(directory)
    assert latest is not None
    return latest


def test_a_step_under_way_comes_back_with_the_weights_that_sample(tmp_path: Path, one_rank_group: dist.ProcessGroup) -> None:
    save(tmp_path, 3)
    unfinished = unfinished_step(2, "missing")
    latest = save_inside(tmp_path, one_rank_group, 3, unfinished)
    assert latest == tmp_path / "step_000003_update_0002"  # beside the whole step of the same number, and newer
    loaded = FakeActor()
    saved = load(latest, actor=loaded, config=config("actor.kept_weights=pinned_host"))
    assert saved.unfinished == unfinished
    assert (loaded.policy_version, loaded.kept_version, saved.counters.next_step) == (48, 32, 3)
    assert loaded.kept_place == "pinned_host"  # the planner counts it there
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000003_update_0002", "step_000004"]


@pytest.mark.parametrize("batch", ["waiting", "none"])
def test_kept_weights_are_saved_only_for_a_batch_that_is_missing(
    batch: BatchState, tmp_path: Path, one_rank_group: dist.ProcessGroup
) -> None:
    latest = save_inside(tmp_path, one_rank_group, 3, unfinished_step(2, batch))
    loaded = FakeActor()
    assert load(latest, actor=loaded).unfinished == unfinished_step(2, batch)
    assert loaded.kept_version is None and not (latest / "sampling_weights").exists()


def test_checkpoints_inside_a_step_are_in_the_order_of_their_states(tmp_path: Path, one_rank_group: dist.ProcessGroup) -> None:
    states: list[tuple[int, int, BatchState]] = [(3, 0, "waiting"), (3, 2, "missing"), (3, 2, "waiting"), (3, 10, "missing")]
    paths = [save(tmp_path, 3, keep=9)]
    paths += [save_inside(tmp_path, one_rank_group, step, unfinished_step(updates, batch)) for step, updates, batch in states]
    paths += [save(tmp_path, 4, keep=9)]
    names = [path.name for path in paths]
    assert names == sorted(names) == sorted(path.name for path in tmp_path.glob("step_*"))
    run_state.forget_later(paths[2])
    assert sorted(path.name for path in tmp_path.glob("step_*")) == names[:3]
    assert run_state.latest_checkpoint(tmp_path) == paths[2]


def test_a_longer_run_does_not_continue_inside_a_step_that_sampled_nothing(tmp_path: Path, one_rank_group: dist.ProcessGroup) -> None:
    end = CONFIG.num_global_steps
    whole, inside = save(tmp_path, end), save_inside(tmp_path, one_rank_group, end, unfinished_step(1, "none"))
    assert run_state.checkpoint_to_continue(tmp_path, CONFIG) == inside
    assert run_state.checkpoint_to_continue(tmp_path, config(f"num_global_steps={end + 1}")) == whole


def test_a_run_without_waiting_batches_comes_back_empty(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    assert load(save(tmp_path / "checkpoints", 1)).waiting == ()


def test_a_waiting_batch_without_behaviour_logprobs_is_refused(
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
    with pytest.raises(RuntimeError, match=r"^checkpoint step_000002 was not written, step_000001 stays the newest: disk full; it needs"):
        save(directory, 2, actor=FakeActor(32, failure=OSError("disk full")))
    assert latest_checkpoint(directory) == earlier
    assert not (directory / "step_000002").exists()
    # What the failure left in its way does not stop the next attempt.
    assert latest_checkpoint(directory) != save(directory, 2)
    assert not list(directory.glob(".*"))
    actor = FakeActor()
    load(directory / "step_000002", actor=actor)
    assert actor.policy_version == 32


@pytest.mark.parametrize(("keep", "left"), [(1, ["step_000004"]), (3, ["step_000002", "step_000003", "step_000004"])])
def test_only_the_newest_checkpoints_are_kept(one_rank_group: dist.ProcessGroup, tmp_path: Path, keep: int, left: list[str]) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path / "checkpoints", step, keep=keep)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", *left]


def test_what_latest_does_not_name_is_written_again_and_the_rest_is_kept(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    """An attempt killed before it moved `latest` leaves a complete checkpoint of a later step behind."""
    directory = tmp_path / "checkpoints"
    for step in (1, 2, 4):
        save(directory, step, keep=1)
    shutil.copytree(directory / "step_000004", directory / "step_000006")
    save(directory, 5, keep=1)
    assert latest_checkpoint(directory) == directory / "step_000005", "not deleted in favour of the later one"
    actor = FakeActor()
    load(save(directory, 6, keep=1), actor=actor)
    assert actor.policy_version == 96
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_000006"]


def test_a_step_whose_checkpoint_is_the_newest_is_not_written_again(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    before = (path / "run.json").stat().st_ino
    save(tmp_path / "checkpoints", 1, actor=FakeActor(failure=AssertionError("not asked")))
    assert (path / "run.json").stat().st_ino == before


def test_training_during_the_writing_of_a_checkpoint_changes_nothing(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoints"
    one, actor = writer(directory, one_rank_group), FakeActor(32)
    actor.may_write.clear()
    counters, cursor = RunCounters(next_step=2, seconds={"sample": 1.0}), {"position": [1]}
    one.save(actor=actor, config=CONFIG, counters=counters, cursor=cursor, waiting=[])  # type: ignore[arg-type]
    # The step after it.
    actor.policy_version, counters.next_step, counters.seconds["sample"] = 48, 3, 2.0
    cursor["position"].append(2)
    assert latest_checkpoint(directory) is None and one.seconds is None
    time.sleep(0.05)
    actor.may_write.set()
    begin(one, 3)  # waits for the former
    assert one.seconds is not None and one.seconds >= 0.05, "from the copy to the disk"
    assert (directory / "step_000002/run.json").exists()
    found = load(directory / "step_000002")
    assert (found.counters, found.cursor) == (RunCounters(next_step=2, seconds={"sample": 1.0}), {"position": [1]})
    one.wait()
    assert latest_checkpoint(directory) == directory / "step_000003"


def test_a_fault_of_ours_in_the_background_is_raised_by_the_next_save(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    one = writer(tmp_path / "checkpoints", one_rank_group)
    begin(one, 1, actor=FakeActor(16, failure=KeyError("moment")))
    with pytest.raises(RuntimeError, match=r"^checkpoint step_000001 was not written, the former ones are kept: KeyError: 'moment'$"):
        begin(one, 2)
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_a_full_disk_costs_a_checkpoint_and_a_line_and_no_more(
    one_rank_group: dist.ProcessGroup, tmp_path: Path, small_disk: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    directory = small_disk(64 << 10) / "checkpoints"
    one = writer(directory, one_rank_group)
    begin(one, 1)
    one.wait()
    (directory / "of_somebody_else").write_bytes(bytes(4096 * (shutil.disk_usage(directory).free // 4096)))
    begin(one, 2)
    with pytest.raises(RuntimeError) as failure:  # the run would end here
        one.wait()
    said = str(failure.value)
    assert re.fullmatch(
        r"checkpoint step_000002 was not written, step_000001 stays the newest: \[Errno 28\] No space left on device; "
        rf"it needs about 1,000 bytes beside the 2 that are kept \(checkpoint.keep\), [\d,]+ are free on {directory.parent}",
        said,
    )
    assert [record.message for record in caplog.records] == [f"{said}; training goes on until the next one"]
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "of_somebody_else", "step_000001"]
    (directory / "of_somebody_else").unlink()
    begin(one, 3)
    one.wait()
    assert latest_checkpoint(directory) == directory / "step_000003"


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning(
    one_rank_group: dist.ProcessGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "checkpoints"
    path = save(directory, 1, keep=1)
    subprocess.run(["mount", "--bind", str(path / "actor"), str(path / "actor")], check=True)  # a folder in use: EBUSY
    try:
        save(directory, 2, keep=1)
    finally:
        subprocess.run(["umount", str(path / "actor")], check=True)
    assert latest_checkpoint(directory) == directory / "step_000002"
    [said] = [record.message for record in caplog.records]
    assert said.startswith(f"checkpoint step_000002 is complete, {path} cannot be deleted: ")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing, expected"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected"),
    ],
)
@pytest.mark.parametrize("name", ["actor/weights", "waiting.safetensors"])
def test_a_missing_or_truncated_file_is_named_before_anything_is_loaded(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path, name: str, damage: Callable[[Path], Any], said: str
) -> None:
    path = save(tmp_path / "checkpoints", 1, waiting=(make_batch(0),))
    damage(path / name)
    with pytest.raises(ValueError) as refusal:
        run_state.refuse_unusable(path, CONFIG)
    assert str(refusal.value).startswith(f"{path / name}: ") and said in str(refusal.value)


def test_no_checkpoint_is_none_and_a_pointer_at_nothing_is_refused(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "latest").write_text("step_000007")
    with pytest.raises(
        ValueError, match=r"latest: names 'step_000007', which holds no run\.json; expected the name of a checkpoint beside it$"
    ):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("counters"),
        lambda state: state["counters"].update(unknown=1),
        lambda state: state["config"].pop("seed"),
        None,
    ],
)
def test_a_foreign_run_json_is_refused_by_name(one_rank_group: dist.ProcessGroup, tmp_path: Path, change: Any) -> None:
    path = save(tmp_path / "checkpoints", 1)
    state = json.loads((path / "run.json").read_text())
    if change is not None:
        change(state)
    (path / "run.json").write_text(json.dumps(state) if change is not None else "{half")
    with pytest.raises(ValueError, match=r"run\.json: not a checkpoint of this version of the program \([^\n]{1,120}\)$"):
        load(path)


def test_a_damaged_actor_checkpoint_is_refused_by_name(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 1)
    with pytest.raises(ValueError, match=r"step_000001/actor: cannot be loaded \(KeyError: 'no such tensor'\)$"):
        load(path, actor=FakeActor(failure=KeyError("no such tensor")))


def test_a_checkpoint_of_another_configuration_is_refused_by_its_keys(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
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


def test_a_checkpoint_of_another_model_is_refused_by_its_sizes(one_rank_group: dist.ProcessGroup, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    moved = config(f"model.path={folder}")
    one = writer(tmp_path / "checkpoints", one_rank_group)
    one.save(actor=FakeActor(), config=moved, counters=RunCounters(next_step=1), cursor={}, waiting=[])  # type: ignore[arg-type]
    one.wait()
    path = tmp_path / "checkpoints/step_000001"
    (folder / "config.json").write_text(json.dumps(MODEL))
    load(path, config=moved)
    (folder / "config.json").write_text(json.dumps(MODEL | {"hidden_size": 128, "vocab_size": 64}))
    with pytest.raises(ValueError) as refusal:
        load(path, config=moved)
    assert f"{path}: of another model than {folder} (" in str(refusal.value)
    assert "vocab_size 32 there, 64 here" in str(refusal.value) and "hidden_size 64 there, 128 here" in str(refusal.value)


@pytest.mark.parametrize(
    "override",
    ["checkpoint.every=3", "world_size=4", "parallel.ep=1", "tracking.log_level=debug", "rollout.base_port=4000", "rollout.servers=2"],
)
def test_where_and_when_may_differ_between_attempts(one_rank_group: dist.ProcessGroup, tmp_path: Path, override: str) -> None:
    load(save(tmp_path / "checkpoints", 1), actor=FakeActor(), config=config(override))


@pytest.mark.usefixtures("one_rank_group")
def test_a_folder_with_runs_and_data_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen_from(folder: str, *overrides: str) -> RunConfig:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "questions.jsonl").write_text("")
        monkeypatch.chdir(tmp_path / folder)
        return config("prompts.source=questions.jsonl", *overrides)

    checkpoints_of(tmp_path / "checkpoints", 1, settings=seen_from("before"))
    checkpoint = tmp_path / "checkpoints/step_000001"
    run_state.refuse_other_run(checkpoint, seen_from("after"))
    with pytest.raises(ValueError, match=r"model\.path: '/.*/before/absent' there, '/.*/after/other' here\)"):
        run_state.refuse_other_run(checkpoint, seen_from("after", "model.path=other"))


def checkpoints_of(directory: Path, *steps: int, settings: RunConfig, keep: int = 2) -> None:
    """One after the other, as a run writes them."""
    assert dist.group.WORLD is not None
    one = writer(directory, dist.group.WORLD, keep=keep)
    for step in steps:
        one.save(actor=FakeActor(), config=settings, counters=RunCounters(next_step=step), cursor={}, waiting=[])  # type: ignore[arg-type]
        one.wait()


@pytest.mark.usefixtures("one_rank_group")
def test_a_longer_run_continues_where_the_shorter_one_stopped_sampling(tmp_path: Path) -> None:
    checkpoints_of(tmp_path, 3, 4, 5, 6, settings=config("num_global_steps=4"), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000004", "step_000006"]
    longer = config("num_global_steps=9")
    chosen = run_state.checkpoint_to_continue(tmp_path, longer)
    assert chosen is not None and chosen.name == "step_000004"
    run_state.refuse_other_run(chosen, longer)
    assert run_state.checkpoint_to_continue(tmp_path, config("num_global_steps=4")) == tmp_path / "step_000006"

    run_state.forget_later(chosen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000004"]
    assert latest_checkpoint(tmp_path) == chosen
    checkpoints_of(tmp_path, 6, settings=longer, keep=1)  # the name that the shorter run's last checkpoint had
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000006"]


@pytest.mark.usefixtures("one_rank_group")
def test_a_run_that_still_samples_is_prolonged_from_its_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints_of(tmp_path, 2, 3, settings=config("num_global_steps=4"))
    assert run_state.checkpoint_to_continue(tmp_path, config("num_global_steps=9")) == tmp_path / "step_000003"
    assert run_state.checkpoint_to_continue(tmp_path / "absent", CONFIG) is None


@pytest.mark.usefixtures("one_rank_group")
def test_a_run_without_an_early_enough_checkpoint_cannot_be_prolonged(tmp_path: Path) -> None:
    checkpoints_of(tmp_path, 6, settings=config("num_global_steps=4"))
    with pytest.raises(ValueError, match=r"num_global_steps = 9: expected a checkpoint of global step 4 or before"):
        run_state.checkpoint_to_continue(tmp_path, config("num_global_steps=9"))


@pytest.mark.usefixtures("one_rank_group")
def test_a_run_cannot_be_shortened(tmp_path: Path) -> None:
    checkpoints_of(tmp_path, 2, settings=config("num_global_steps=4"))
    with pytest.raises(ValueError, match=r"num_global_steps = 3: .* is of a run of 4; a run can be prolonged, not shortened"):
        run_state.refuse_other_run(tmp_path / "step_000002", config("num_global_steps=3"))


def test_what_an_attempt_sampled_after_its_checkpoint_is_counted_as_lost() -> None:
    def resumed() -> RunCounters:
        """As every attempt reads them from the one checkpoint."""
        return RunCounters(rollouts_sampled=64, rollouts_trained=32)

    counters = resumed()
    counters.count_lost(96, recorded=0)
    assert (counters.rollouts_sampled, counters.rollouts_lost, counters.rollouts_trained) == (96, 32, 32)

    counters = resumed()  # that attempt ended before it wrote a line: its metrics were cut, its count was recorded
    counters.count_lost(64, recorded=32)
    assert (counters.rollouts_sampled, counters.rollouts_lost) == (96, 32)

    counters = resumed()  # this one sampled two batches (64 + 32 lost + 64) and was killed as well
    counters.count_lost(160, recorded=32)
    assert (counters.rollouts_sampled, counters.rollouts_lost) == (160, 96)


def test_a_batch_that_arrived_without_a_line_of_metrics_is_counted_as_lost(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "total/rollouts_sampled": 64}\n')
    write_sampled(tmp_path, 96)  # killed while batch 2 waited for its score
    for _ in range(2):  # the second time by an attempt that sampled nothing
        counters = RunCounters(rollouts_sampled=32, rollouts_trained=32)
        count_lost(tmp_path, counters)
        assert (counters.rollouts_sampled, counters.rollouts_lost) == (96, 64)
    assert (tmp_path / "rollouts_lost.json").read_text() == "64\n"
