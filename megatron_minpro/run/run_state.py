"""A run's whole state on disk: one directory per checkpoint, complete or absent. checkpoint_writer.py writes it.

checkpoints/step_000020/actor/              Megatron torch_dist: model and optimizer, loads onto other layouts
                        run.json            counters, prompt cursor, policy version; the size of every other file
                        sampling_weights/   only inside a step whose batch is missing: the weights that are to sample it
                        waiting.safetensors the batches that are sampled but not trained to the end yet
                        routing/            with actor.routing_replay: the experts that their tokens visited
                        top_tokens/         with objective.score_centering: the servers' most likely tokens at each of theirs
checkpoints/latest                          name of the newest complete directory

A checkpoint inside a global step says how many updates of it are done, and whether the batch that the step samples is in it:

step_000020 < step_000020_update_0003 < step_000020_update_0003_sampled < step_000020_update_0004 < step_000021
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from checkpoints_convert.atomic_files import write_atomically
from checkpoints_convert.hf_config import Architecture, read_architecture
from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.config import RunConfig, flatten_differences, may_change_on_resume
from megatron_minpro.loop.counters import RunCounters, StepSeconds, UnfinishedStep
from megatron_minpro.run.run_folder import LATEST_FILE, STATE_FILE

if TYPE_CHECKING:
    from parallel.actor import MegatronActor  # the launcher, which makes no actor, starts without importing Megatron-Core

ACTOR_FOLDER = "actor"
KEPT_FOLDER = "sampling_weights"
WAITING_FILE = "waiting.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What `load` gives back beside the actor, which it loads in place."""

    counters: RunCounters
    cursor: dict[str, Any]
    waiting: tuple[RolloutBatch, ...]
    unfinished: UnfinishedStep | None


def checkpoint_name(next_step: int, unfinished: UnfinishedStep | None) -> str:
    """Of the folder. Names are in the order of the states: a later state of a run has a later name.

    Args:
        next_step: the global step that comes next, or that is under way.
        unfinished: what is done of it; None before it has begun.
    """
    name = f"step_{next_step:06d}"
    if unfinished is None:
        return name
    return f"{name}_update_{unfinished.updates:04d}{'_sampled' if unfinished.batch == 'waiting' else ''}"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint under `directory`, or None. Raises ValueError when `latest` names one that is not there."""
    pointer = directory / LATEST_FILE
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    if not (directory / name / STATE_FILE).is_file():
        raise ValueError(f"{pointer}: names {name!r}, which holds no {STATE_FILE}; expected the name of a checkpoint beside it")
    found = directory / name
    return found


def checkpoint_to_continue(directory: Path, config: RunConfig) -> Path | None:
    """The checkpoint from which `config` continues: the newest complete one, but for a run that was made longer.

    The last `staleness` global steps of a run sample nothing. A longer run would have sampled in them, so it continues from the newest
    checkpoint before them and ends as if it had been that long from the start. The checkpoint writer keeps that checkpoint.

    Raises:
        ValueError: `latest` names a checkpoint that is not there, or no checkpoint is early enough.
    """
    newest = latest_checkpoint(directory)
    if newest is None or not _is_too_late(newest, config):
        return newest
    earlier = [path for path in sorted(directory.glob("step_*")) if (path / STATE_FILE).is_file() and not _is_too_late(path, config)]
    if not earlier:
        raise ValueError(
            f"{directory}: num_global_steps = {config.num_global_steps}: expected a checkpoint of global step "
            f"{read_state(newest).config.num_global_steps} or before, where the run stopped sampling; all that are kept are later"
        )
    return earlier[-1]


def _is_too_late(checkpoint: Path, config: RunConfig) -> bool:
    """Whether it was saved in a step without sampling, once that had begun, in which `config` samples."""
    state = read_state(checkpoint)
    steps = state.config.num_global_steps
    return config.num_global_steps > steps and (state.counters.next_step, state.unfinished is not None) > (steps, False)


def forget_later(checkpoint: Path) -> None:
    """Make `checkpoint` the newest: `latest` names it, and later ones are deleted. Where it is the newest already nothing happens."""
    write_atomically(checkpoint.parent / LATEST_FILE, checkpoint.name)
    for path in checkpoint.parent.glob("step_*"):
        if path.name > checkpoint.name:
            shutil.rmtree(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """run.json, read."""

    config: RunConfig
    counters: RunCounters
    policy_version: int
    cursor: dict[str, Any]
    waiting: list[dict[str, Any]]
    model: dict[str, Any]  # describe_model of what was trained
    files: dict[str, int]  # bytes of every other file of the checkpoint, by its path inside it
    unfinished: UnfinishedStep | None
    kept_version: int | None  # policy version of the weights in KEPT_FOLDER


def read_state(checkpoint: Path) -> StateFile:
    """What a checkpoint says of itself, without its tensors. Raises ValueError naming the file."""
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text())
        config = RunConfig.model_validate_json(json.dumps(state.pop("config")))
        counters, unfinished = RunCounters(**state.pop("counters")), _unfinished(state.pop("unfinished"))
        return StateFile(config=config, counters=counters, unfinished=unfinished, **state)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: not a checkpoint of this version of the program (config.{setting}: {first['msg']})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this version of the program ({' '.join(str(error).split())})") from error


def _unfinished(values: dict[str, Any] | None) -> UnfinishedStep | None:
    """The counterpart of `asdict`, after a way through JSON."""
    if values is None:
        return None
    seconds = StepSeconds(**values.pop("seconds"))
    return UnfinishedStep(lags=tuple(values.pop("lags")), reports=tuple(values.pop("reports")), seconds=seconds, **values)


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """What StateFile.files says of a complete checkpoint."""
    return {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / STATE_FILE
    }


def refuse_unusable(checkpoint: Path, config: RunConfig) -> None:
    """Raise ValueError for a checkpoint that lacks a part, naming the file, or that `config` cannot continue: before anything starts."""
    found = file_sizes(checkpoint)
    for name, size in read_state(checkpoint).files.items():
        if found.get(name) != size:
            what = "is missing" if name not in found else f"has {found[name]:,} bytes"
            raise ValueError(
                f"{checkpoint / name}: {what}, expected {size:,} bytes; the former checkpoint's name in latest goes back to it"
            )
    refuse_other_run(checkpoint, config)
    folder = Path(config.model.path)
    if folder.exists():
        here, there = describe_model(read_architecture(folder)), read_state(checkpoint).model
        differing = [f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in here | there if here.get(key) != there.get(key)]
        if differing:
            raise ValueError(
                f"{checkpoint}: of another model than {folder} ({'; '.join(differing)}); expected a new name=... or that model"
            )


def describe_model(architecture: Architecture) -> dict[str, Any]:
    """The shape of a model in JSON's types."""
    return asdict(architecture)


def refuse_other_run(checkpoint: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the settings, when the checkpoint belongs to a run that computes something else than `config`.

    A run may become longer: num_global_steps may grow. The folder that holds runs, models and data together may stand in another place.
    """
    saved = read_state(checkpoint).config
    if config.num_global_steps < saved.num_global_steps:
        raise ValueError(
            f"num_global_steps = {config.num_global_steps}: {checkpoint} is of a run of {saved.num_global_steps}; a run can be prolonged, "
            f"not shortened; expected at least {saved.num_global_steps} or a new name=..."
        )
    differences = {
        key: values
        for key, values in flatten_differences(saved, config).items()
        if not may_change_on_resume(key) and not _moved(*values, saved=saved, config=config)
    }
    if differences:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(differences.items())[:5])
        raise ValueError(f"{checkpoint}: of a run with another configuration ({shown}); expected a new name=... or the same settings")


def _moved(there: Any, here: Any, *, saved: RunConfig, config: RunConfig) -> bool:
    """Whether two values are paths that lead to one place, seen from output_dir: the folder around both was moved, or is mounted elsewhere.

    What lies there is checked by itself: the model's shape, and the digests of the prompts.
    """
    if not all(isinstance(value, str) and Path(value).is_absolute() for value in (there, here)):
        return False
    return os.path.relpath(there, saved.output_dir) == os.path.relpath(here, config.output_dir)


def load(checkpoint: Path, *, actor: MegatronActor, config: RunConfig) -> SavedRun:
    """Collective. Loads the actor in place.

    Raises ValueError naming a file that is missing or not what `save` wrote, and for a run with another configuration.
    """
    refuse_unusable(checkpoint, config)
    state = read_state(checkpoint)
    try:
        actor.load(checkpoint / ACTOR_FOLDER, policy_version=state.policy_version)
    except Exception as error:  # Megatron has no error type of its own for a damaged checkpoint
        raise ValueError(
            f"{checkpoint / ACTOR_FOLDER}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    path = checkpoint / WAITING_FILE
    try:
        waiting = _read_batches(path, state.waiting)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: not what was saved ({type(error).__name__}: {error})") from error
    if state.kept_version is not None:
        actor.load_kept(checkpoint / KEPT_FOLDER, policy_version=state.kept_version, place=config.actor.kept_weights)
    return SavedRun(counters=state.counters, cursor=state.cursor, waiting=waiting, unfinished=state.unfinished)


def join_batches(batches: Sequence[RolloutBatch]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What run.json and waiting.safetensors hold of the batches."""
    records: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        record, streams = batch_streams.pack(batch)
        records.append(record)
        tensors |= {f"{number}.{name}": stream for name, stream in streams.items()}
    return records, tensors


def _read_batches(path: Path, records: Sequence[dict[str, Any]]) -> tuple[RolloutBatch, ...]:
    with safe_open(path, framework="pt") as file:
        return tuple(
            batch_streams.unpack(record, {name: file.get_tensor(f"{number}.{name}") for name in record["streams"]})
            for number, record in enumerate(records)
        )
