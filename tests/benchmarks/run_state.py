"""A run's checkpoint: the pause that training sees against writing it before going on, and saving and loading against cp."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import torch
from actor import build_actor, start_alone, write_model
from rows import Row

from checkpoints_convert.atomic_directory import fsync_tree
from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.config import load_config
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.run import run_state
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from parallel import process_groups
from parallel.actor import MegatronActor
from parallel.capabilities import detect
from rollout.freed_memory import keep_freed_memory
from rollout.records import VersionSpan

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
REPEATS = 7
_ROOT = Path(__file__).resolve().parents[2]


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files; needs 2 GB there."""
    groups = start_alone(detect())
    keep_freed_memory()  # as ranks do
    scratch = folder / "run_state"
    try:
        write_model(scratch / "model", SHAPE)
        with SafetensorsReader(scratch / "model") as reader:
            actor = build_actor(read_architecture(scratch / "model"), groups, detect(), reader.read, dtype=torch.float32, max_tokens=4096)
        return checkpoint_rows(actor, scratch / "model", groups, scratch / "checkpoints")
    finally:
        process_groups.shut_down()
        shutil.rmtree(scratch)


def checkpoint_rows(actor: MegatronActor, model: Path, groups: process_groups.ProcessGroups, directory: Path) -> list[Row]:
    """One checkpoint of the actor with two waiting batches of 64 responses of 1,000 tokens, many times, its pages on the disk each time."""
    config = load_config(_ROOT / "configs/tiny_moe_cpu.yaml", [f"model.path={model}"])
    waiting = tuple(waiting_batch(step, num_tokens=1000) for step in range(2))
    directory.mkdir(parents=True)
    writer = CheckpointWriter(directory, run_dir=directory, keep=1, control_group=groups.control, saving_group=groups.saving)
    pauses, saves, copies, loads = [], [], [], []
    for step in range(1, REPEATS + 1):
        os.sync()  # what others left unwritten is not ours to wait for
        start = time.perf_counter()
        writer.save(actor=actor, config=config, counters=RunCounters(next_step=step), cursor={}, waiting=waiting)
        pauses.append(time.perf_counter() - start)
        writer.wait()  # also until the former checkpoint is deleted; writer.seconds leaves that out, as cp deletes nothing
        assert writer.seconds is not None
        saves.append(writer.seconds)
        checkpoint = directory / f"step_{step:06d}"
        os.sync()
        start = time.perf_counter()
        shutil.copytree(checkpoint, directory / "copy")
        fsync_tree(directory / "copy")
        copies.append(time.perf_counter() - start)
        shutil.rmtree(directory / "copy")
        start = time.perf_counter()
        run_state.load(checkpoint, actor=actor, config=config)
        loads.append(time.perf_counter() - start)
    size = sum(run_state.file_sizes(checkpoint).values())
    pause, save, copy, load = (statistics.median(times) for times in (pauses, saves, copies, loads))
    what = f"of {size / 1e6:.0f} MB, one rank"

    def speed(seconds: float) -> str:
        return f"{size / 1e9 / seconds:.2f} GB/s"

    return [
        Row(
            name=f"checkpoint {what}: the pause that training sees",
            seconds=pause,
            peer="the whole save, training waiting for it",
            peer_seconds=save,
            target=0.1,
        ),
        Row(
            name=f"checkpoint {what}: saving it, {speed(save)}",
            seconds=save,
            peer=f"cp and fsync of the same files, {speed(copy)}",
            peer_seconds=copy,
            target=1.5,
        ),
        Row(
            name=f"checkpoint {what}: loading it from the page cache, {speed(load)}",
            seconds=load,
            peer=f"cp and fsync of the same files, {speed(copy)}",
            peer_seconds=copy,
            target=1.5,
        ),
    ]


def waiting_batch(step: int, *, num_tokens: int) -> RolloutBatch:
    """64 responses of so many tokens to prompts of 100."""
    samples = tuple(
        Sample(
            sample_id=f"step{step}-{number}",
            token_ids=torch.randint(0, SHAPE["vocab_size"], (100 + num_tokens,), dtype=torch.int32),
            loss_mask=torch.arange(100 + num_tokens) >= 100,
            engine_logprobs=-torch.rand(num_tokens),
            behaviour_logprobs=-torch.rand(num_tokens),
            version_spans=(VersionSpan(policy_version=0, start=0, end=num_tokens),),
            finish_reason="stop",
            reward=0.0,
            correct=False,
            advantage=0.0,
        )
        for number in range(64)
    )
    return RolloutBatch(sampled_at_step=step, policy_version=0, group_size=8, samples=samples)
