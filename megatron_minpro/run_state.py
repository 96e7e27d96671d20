"""A run's whole state on disk: one directory per checkpoint, complete or absent.

checkpoints/step_000020/actor/              Megatron torch_dist: model and optimizer, loads onto other layouts
                        run.json            counters, prompt cursor, policy version
                        waiting.safetensors the batches that are sampled but not trained yet
checkpoints/latest                          name of the newest complete directory
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoints_convert.atomic_directory import fsync_tree
from megatron_minpro.atomic_files import write_atomically
from megatron_minpro.config import RunConfig, flatten_differences
from megatron_minpro.samples import RolloutBatch, Sample
from parallel.actor import MegatronActor

_NAME = re.compile(r"^step_(\d{6})$")
# What may differ between attempts at one run: where and when, not what. Another layout changes the order of sums at most.
FREE_TO_CHANGE = (
    "actor.max_tokens_per_micro_batch",
    "actor.recompute",
    "checkpoint.",
    "debug.check_weights",
    "output_dir",
    "parallel.",
    "rollout.admin_key_path",
    "rollout.api_key_path",
    "rollout.base_port",
    "rollout.endpoints",
    "rollout.host",
    "rollout.max_retries",
    "rollout.request_timeout_s",
    "rollout.servers",
    "rollout.start_timeout_s",
    "rollout.weight_sync",
    "tracking.",
    "world_size",
)


@dataclass(slots=True, kw_only=True)
class RunCounters:
    """Where a run stands. Seconds and what counts lost responses are kept by rank 0; the rest is the same on all ranks."""

    next_step: int = 0  # the global step that comes next
    trained_batches: int = 0
    rollouts_sampled: int = 0
    rollouts_trained: int = 0
    rollouts_lost: int = 0
    rollouts_dropped: int = 0  # by dynamic sampling
    tokens_trained: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, over all attempts

    def count_lost(self, metrics: Iterable[Mapping[str, float | None]], *, recorded: int) -> None:
        """Count as lost what earlier attempts sampled after this checkpoint and will be sampled anew, in steps they finished.

        metrics: the lines the last attempt wrote, before they are truncated. recorded: lost responses known when it started.
        """
        kept = self.rollouts_sampled - self.rollouts_lost
        sampled = max((int(line.get("rollouts_sampled") or 0) for line in metrics), default=0)
        self.rollouts_lost = recorded + max(0, sampled - (kept + recorded))
        self.rollouts_sampled = kept + self.rollouts_lost


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What `load` gives back beside the actor, which it loads in place."""

    counters: RunCounters
    cursor: dict[str, Any]
    waiting: tuple[RolloutBatch, ...]


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint under `directory`, or None. Raises ValueError when `latest` names one that is not there."""
    pointer = directory / "latest"
    if not pointer.exists():
        return None
    found = directory / pointer.read_text().strip()
    if not (found / "run.json").is_file():
        raise ValueError(f"{pointer}: names {found.name}, which holds no run.json")
    return found


def save(
    directory: Path,
    *,
    actor: MegatronActor,
    config: RunConfig,
    counters: RunCounters,
    cursor: dict[str, Any] | None,
    waiting: Sequence[RolloutBatch],
    keep: int,
) -> Path:
    """Collective. cursor: rank 0's prompt cursor state (ignored elsewhere). Keeps the newest `keep` checkpoints.

    The new directory appears by rename after everything in it is on disk; a failure leaves the earlier checkpoints as they were.
    """
    name = f"step_{counters.next_step:06d}"
    final, partial = directory / name, directory / f".{name}.partial"
    first = dist.get_rank() == 0
    if first:
        for unfinished in directory.glob(".step_*.partial"):
            shutil.rmtree(unfinished)
        (partial / "actor").mkdir(parents=True)
    dist.barrier()
    actor.save(partial / "actor")
    if first:
        tensors, records = _pack(waiting)
        save_file(tensors, partial / "waiting.safetensors")
        state = {
            "config": config.model_dump(mode="json"),
            "counters": asdict(counters),
            "policy_version": actor.policy_version,
            "cursor": cursor,
            "waiting": records,
        }
        (partial / "run.json").write_text(json.dumps(state))
        fsync_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        write_atomically(directory / "latest", name)
        for old in sorted(path for path in directory.iterdir() if _NAME.match(path.name))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """run.json, read."""

    config: RunConfig
    counters: RunCounters
    policy_version: int
    cursor: dict[str, Any]
    waiting: list[dict[str, Any]]


def read_state(checkpoint: Path) -> StateFile:
    """What a checkpoint says of itself, without its tensors. Raises ValueError naming the file."""
    path = checkpoint / "run.json"
    try:
        state = json.loads(path.read_text())
        config = RunConfig.model_validate_json(json.dumps(state.pop("config")))
        return StateFile(config=config, counters=RunCounters(**state.pop("counters")), **state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this program ({' '.join(str(error).split())})") from error


def refuse_other_run(checkpoint: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the settings, when the checkpoint belongs to a run that computes something else than `config`."""
    differences = {
        key: values
        for key, values in flatten_differences(read_state(checkpoint).config, config).items()
        if not key.startswith(FREE_TO_CHANGE)
    }
    if differences:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(differences.items())[:5])
        raise ValueError(f"{checkpoint}: of a run with another configuration ({shown}); expected a new name=... or the same settings")


def load(checkpoint: Path, *, actor: MegatronActor, config: RunConfig) -> SavedRun:
    """Collective. Loads the actor in place.

    Raises ValueError naming a file that is missing or not what `save` wrote, and for a run with another configuration.
    """
    refuse_other_run(checkpoint, config)
    state = read_state(checkpoint)
    try:
        actor.load(checkpoint / "actor", policy_version=state.policy_version)
    except Exception as error:  # Megatron has no error type of its own for a damaged checkpoint
        raise ValueError(
            f"{checkpoint / 'actor'}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from error
    path = checkpoint / "waiting.safetensors"
    try:
        waiting = _unpack(path, state.waiting)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: not what was saved ({type(error).__name__}: {error})") from error
    return SavedRun(counters=state.counters, cursor=state.cursor, waiting=waiting)


# Long per-token lists go into tensors, everything else into JSON. float64 keeps the engine's numbers bit for bit.
_PER_TOKEN = {
    "token_ids": torch.int32,
    "engine_logprobs": torch.float64,
    "behaviour_logprobs": torch.float64,
    "correction_weights": torch.float64,
}


def _pack(batches: Sequence[RolloutBatch]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    tensors: dict[str, torch.Tensor] = {}
    records: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        samples = []
        # Corrections may be off: then no sample of the batch has their weights.
        joined: dict[str, list[float]] = {name: [] for name in _PER_TOKEN if getattr(batch.samples[0], name) is not None}
        for sample in batch.samples:
            if sample.behaviour_logprobs is None:
                raise ValueError(f"{sample.sample_id}: behaviour_logprobs are missing from a batch that waits")
            record = {name: getattr(sample, name) for name in Sample.__dataclass_fields__}
            for name in _PER_TOKEN:
                values = record.pop(name)
                if name in joined:
                    joined[name] += values
            samples.append({**record, "num_tokens": len(sample.token_ids)})
        for name, values in joined.items():
            tensors[f"{number}.{name}"] = torch.tensor(values, dtype=_PER_TOKEN[name])
        records.append(
            {
                "sampled_at_step": batch.sampled_at_step,
                "policy_version": batch.policy_version,
                "group_size": batch.group_size,
                "per_token": list(joined),
                "samples": samples,
            }
        )
    if not tensors:
        tensors["empty"] = torch.zeros(1)
    return tensors, records


def _unpack(path: Path, records: Sequence[dict[str, Any]]) -> tuple[RolloutBatch, ...]:
    batches = []
    with safe_open(path, framework="pt") as file:
        for number, record in enumerate(records):
            values = {name: file.get_tensor(f"{number}.{name}").tolist() for name in record.pop("per_token")}
            position = dict.fromkeys(values, 0)
            samples = []
            for fields in record["samples"]:
                num_tokens = fields.pop("num_tokens")
                lengths = dict.fromkeys(values, num_tokens - fields["prompt_tokens"]) | {"token_ids": num_tokens}
                streams = {}
                for name, length in lengths.items():
                    streams[name] = tuple(values[name][position[name] : position[name] + length])
                    position[name] += length
                samples.append(Sample(**{**fields, "policy_versions": tuple(fields["policy_versions"]), **streams}))
            batches.append(RolloutBatch(**{**record, "samples": tuple(samples)}))
    return tuple(batches)
