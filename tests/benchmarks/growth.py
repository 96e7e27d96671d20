"""How cost grows: each at four sizes, with the exponent of a power fitted to them. 1 is linear.

CPU seconds, so that other processes on the machine do not show. A row compares the largest size with linear growth from the smallest;
growth.png has all sizes.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from actor import build_actor, least_seconds, start_alone, write_model
from convert import MANY, make_model, run_convert
from cpu_time import tree_cpu_s
from matplotlib import pyplot as plt
from rows import Row, resident_bytes
from run_state import SHAPE, waiting_batch

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.config import load_config
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.report.style import save, set_title, style
from megatron_minpro.rewards.grader_pool import GraderPool
from megatron_minpro.run import run_state
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from parallel import process_groups
from parallel.actor import MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.packing import plan_replicas
from parallel.prefix_scan import PrefixMin, fold, local_scan, scan
from parallel.sequence_shard import SequenceShard

_TARGET = 1.25  # of linear growth from the smallest size
_SORTING_TARGET = 2.0  # of n log n: the largest sizes have left the caches
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What something costs at four sizes."""

    name: str
    unit: str  # of the sizes
    sizes: Sequence[int]  # ascending
    seconds: Sequence[float]  # of CPU
    held_bytes: Sequence[int] | None = None  # where the row is about memory
    sorts: bool = False  # n log n is then what is linear for others

    def exponent(self, values: Sequence[float]) -> float:
        """Slope of a line through the logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(values), 1)[0])

    def row(self) -> Row:
        """The largest size against linear growth from the smallest."""
        first, last = self.sizes[0], self.sizes[-1]
        factor = last / first * (math.log(last) / math.log(first) if self.sorts else 1.0)
        grown = f"{self.unit}^{self.exponent(self.seconds):.2f}"
        if self.held_bytes is not None:
            grown += f", bytes as {self.unit}^{self.exponent(self.held_bytes):.2f}"
        return Row(
            name=f"{self.name}: grows as {grown}, {first:,} to {last:,}",
            seconds=self.seconds[-1],
            peer=f"{factor:.3g} times that of {first:,}{', as n log n' if self.sorts else ''}",
            peer_seconds=factor * self.seconds[0],
            target=None if self.held_bytes is not None else _SORTING_TARGET if self.sorts else _TARGET,
            own_bytes=None if self.held_bytes is None else self.held_bytes[-1],
            peer_bytes=None if self.held_bytes is None else round(factor * self.held_bytes[0]),
            bytes_target=None if self.held_bytes is None else _TARGET,
        )


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder; gets growth.png, and scratch files, 1 GB for a while."""
    scratch = folder / "growth"
    scratch.mkdir()
    groups = start_alone(detect())
    try:
        curves = [
            waiting_tokens(),  # first: what the others leave in memory would hide its own
            scan_over_tokens(),
            scan_over_ranks(),
            packing(),
            grading(),
            export(groups, scratch / "export"),
            resuming(groups, scratch / "resume"),
            *conversion(scratch / "convert"),
        ]
    finally:
        process_groups.shut_down()
        shutil.rmtree(scratch)
    plot(curves, folder / "growth.png")
    return [curve.row() for curve in curves]


def scan_over_tokens() -> Curve:
    """The prefix minimum of 8 packed sequences."""
    sizes = [2**15, 2**17, 2**19, 2**21]
    return Curve(name="prefix-min scan, one rank", unit="tokens", sizes=sizes, seconds=[_scan_s(size) for size in sizes])


def _scan_s(num_tokens: int) -> float:
    shard = SequenceShard.whole([num_tokens // 8] * 8)
    request = PrefixMin(torch.randn(num_tokens), torch.rand(num_tokens) < 0.9)
    return _least(lambda: scan(shard, [request]), rounds=10)


def scan_over_ranks() -> Curve:
    """Of all ranks together, the sequences growing with them: a rank's own pass, and joining it with the summaries of all others."""
    ranks = [2, 4, 8, 16]
    return Curve(
        name="prefix-min scan, cp 2 to 16, a rank holding 65,536 tokens, without the collective",
        unit="tokens",
        sizes=[65_536 * cp for cp in ranks],
        seconds=[cp * _share_s(cp) for cp in ranks],
    )


def _share_s(cp_size: int) -> float:
    shard = SequenceShard.zigzag([8192 * cp_size] * 8, 0, cp_size, None)
    requests = [PrefixMin(torch.randn(shard.num_local_tokens), torch.rand(shard.num_local_tokens) < 0.9)]

    def share() -> object:
        local = local_scan(shard, requests)
        summaries = local[0].summary[:1].repeat(shard.num_chunks, 1, 1)
        return fold(shard, requests, local, summaries)

    return _least(share, rounds=20)


def packing() -> Curve:
    """Sequences of 100 to 8,000 positions to 8 replicas and micro-batches of 16,384."""
    sizes = [2048, 8192, 32_768, 131_072]
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 8000, sizes[-1]).tolist()
    layout = ParallelLayout(world_size=8)

    def plan(size: int) -> Callable[[], object]:
        return lambda: plan_replicas(lengths[:size], layout, max_tokens=16_384, break_even=9000.0)

    return Curve(name="packing", unit="sequences", sizes=sizes, seconds=[_least(plan(size), rounds=5) for size in sizes], sorts=True)


def waiting_tokens() -> Curve:
    """Batches of 64 responses as they wait for their update. All are kept, so that each takes new memory."""
    sizes, seconds, held, batches = [], [], [], []
    for num_tokens in (4_000, 8_000, 16_000, 32_000):
        gc.collect()
        before, start = resident_bytes("VmRSS"), time.process_time()
        batch = waiting_batch(0, num_tokens=num_tokens)
        seconds.append(time.process_time() - start)
        held.append(resident_bytes("VmRSS") - before)
        sizes.append(batch.num_response_tokens)
        batches.append(batch)
    per_token = held[-1] / sizes[-1]
    return Curve(name=f"waiting batch, {per_token:.1f} bytes a token", unit="tokens", sizes=sizes, seconds=seconds, held_bytes=held)


def export(groups: process_groups.ProcessGroups, scratch: Path) -> Curve:
    """The actor's small weights, tensor by tensor, as the weight sync and the exported policy take them."""
    sizes, seconds = [], []
    for layers in (8, 16, 32, 64):
        actor = _actor(scratch / str(layers), groups, num_hidden_layers=layers, num_experts=64)
        sizes.append(sum(1 for _ in actor.export_weights()))
        seconds.append(_least(lambda actor=actor: deque(actor.export_weights(), maxlen=0), rounds=5))  # type: ignore[misc]
    return Curve(name="weight export, one rank", unit="tensors", sizes=sizes, seconds=seconds)


def _actor(folder: Path, groups: process_groups.ProcessGroups, **shape: int) -> MegatronActor:
    write_model(folder, SHAPE | {"vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 16, "head_dim": 16, **shape})
    with SafetensorsReader(folder) as reader:
        return build_actor(read_architecture(folder), groups, detect(), reader.read, dtype=torch.float32, max_tokens=4096)


def grading() -> Curve:
    """Different answers, so that nothing is remembered from another size; the workers' CPU seconds too."""
    sizes, seconds, first = [100, 200, 400, 800], [], 1000
    with GraderPool(workers=1, timeout_s=10.0, memory_mb=4096) as pool:
        pool.compare([("1", "1")])
        for size in sizes:
            pairs = [(f"\\frac{{{n}}}{{997}}", f"{n}/997") for n in range(first, first + size)]
            before = tree_cpu_s(os.getpid())
            pool.compare(pairs)
            seconds.append(tree_cpu_s(os.getpid()) - before)
            first += size
    return Curve(name="grading", unit="answers", sizes=sizes, seconds=seconds)


def resuming(groups: process_groups.ProcessGroups, scratch: Path) -> Curve:
    """Reading a checkpoint of a small model with waiting batches of 64 responses of 16,000 tokens."""
    actor = _actor(scratch / "model", groups, num_hidden_layers=2)
    config = load_config(_ROOT / "configs/tiny_moe_cpu.yaml", [f"model.path={scratch / 'model'}"])
    sizes, seconds = [1, 2, 4, 8], []
    for size in sizes:
        directory = scratch / str(size)
        directory.mkdir()
        writer = CheckpointWriter(directory, run_dir=directory, keep=1, control_group=groups.control, saving_group=groups.saving)
        waiting = tuple(waiting_batch(step, num_tokens=16_000) for step in range(size))
        writer.save(actor=actor, config=config, counters=RunCounters(next_step=size), cursor={}, waiting=waiting)
        writer.wait()
        seconds.append(_least(lambda: run_state.load(directory / f"step_{size:06d}", actor=actor, config=config), rounds=3))  # noqa: B023
    return Curve(name="resuming, waiting batches of a million tokens", unit="batches", sizes=sizes, seconds=seconds)


def conversion(scratch: Path) -> Iterator[Curve]:
    """Small tensors, as many as the 30B has at the largest size; without the imports."""
    scratch.mkdir()
    sizes: list[int] = []
    seconds: dict[str, list[float]] = {"hf-to-megatron": [], "megatron-to-hf": []}
    for layers in (6, 12, 24, 48):
        source, _, num_tensors = make_model(scratch / f"{layers}", MANY | {"num_hidden_layers": layers})
        megatron, back = scratch / "megatron", scratch / "back"
        sizes.append(num_tensors)
        seconds["hf-to-megatron"].append(run_convert(["hf-to-megatron", str(source), str(megatron)]).cpu_seconds)
        seconds["megatron-to-hf"].append(run_convert(["megatron-to-hf", str(megatron), str(back)]).cpu_seconds)
        shutil.rmtree(megatron)
        shutil.rmtree(back)
    for name, found in seconds.items():
        yield Curve(name=f"convert {name}", unit="tensors", sizes=sizes, seconds=found)


def _least(function: Callable[[], object], *, rounds: int) -> float:
    return least_seconds({"it": function}, rounds=rounds)["it"]


def plot(curves: Sequence[Curve], path: Path) -> None:
    """All curves, each as multiples of its smallest size and that size's cost."""
    with style():
        figure, axes = plt.subplots(figsize=(7.2, 5.0))
        most = max(curve.sizes[-1] / curve.sizes[0] for curve in curves)
        axes.plot([1, most], [1, most], color="#8a8f98", linewidth=1.0, linestyle="--", label="linear")
        for curve in curves:
            values = curve.seconds if curve.held_bytes is None else curve.held_bytes
            grown = [size / curve.sizes[0] for size in curve.sizes]
            axes.plot(
                grown, [value / values[0] for value in values], marker="o", markersize=3, linewidth=1.4, label=curve.name.split(",")[0]
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel("size, times the smallest")
        axes.set_ylabel("cost, times that of the smallest")
        set_title(axes, "How cost grows")
        axes.legend(fontsize=8)
        save(figure, path)
