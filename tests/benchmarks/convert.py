"""`minpro convert` against cp and sync of the same bytes: seconds and peak memory; and the cost per tensor at the real 30B's count.

Every run is a process of its own. Its seconds are those of the command without the imports (2 to 3 s whatever the model), the best of
a few; its peak is that of the whole process. MINPRO_MBRIDGE_PYTHON names an interpreter that has mbridge 0.15.1, transformers 4 and
megatron-core 0.16.1; then mbridge loads the same checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rows import Row
from torch import Tensor

from checkpoints_convert.hf_config import Architecture, config_with_both_spellings
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.safetensors_io import write_checkpoint

_REPEATS = 3
_RATIO, _PEAK = 1.5, 800_000_000  # what is promised: of cp and sync; of any model size
_COMMON = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_act": "silu",
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_LARGE = _COMMON | {
    "vocab_size": 50_304,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 32,
    "moe_intermediate_size": 768,
}
MANY = _COMMON | {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 128,
    "moe_intermediate_size": 32,
}
_QUARTER = MANY | {"num_hidden_layers": 12}


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files, 8 GB for a while."""
    scratch = folder / "convert"
    scratch.mkdir()
    try:
        return [*_against_cp(scratch), *_per_tensor(scratch)]
    finally:
        shutil.rmtree(scratch)


def _against_cp(scratch: Path) -> Iterator[Row]:
    source, num_bytes, num_tensors = make_model(scratch / "large", _LARGE)
    copies: list[float] = []
    runs: dict[str, list[_Run]] = {}
    for _ in range(_REPEATS):  # alternating: whatever else the machine does then meets all of them
        copies.append(_copy_and_sync(source, scratch / "copy"))
        for name, run in _there_and_back(source):
            runs.setdefault(name, []).append(run)
    copy = min(copies)
    for name, found in runs.items():
        best = min(found)
        yield Row(
            name=f"convert {name}, {num_bytes / 1e9:.2f} GB in {num_tensors} tensors: {num_bytes / best.seconds / 1e9:.2f} GB/s, "
            f"{best.cpu_seconds:.2f} s of CPU",
            seconds=best.seconds,
            peer=f"cp and sync: {num_bytes / copy / 1e9:.2f} GB/s",
            peer_seconds=copy,
            target=_RATIO,
            peak_bytes=max(run.peak_bytes for run in found),
            peak_target=_PEAK,
        )
    yield from _against_mbridge(source, min(runs["hf-to-megatron"]))
    shutil.rmtree(source)


def _per_tensor(scratch: Path) -> Iterator[Row]:
    """Four times the tensors must cost four times the seconds."""
    models = [make_model(scratch / label, config) for label, config in (("many", MANY), ("quarter", _QUARTER))]
    runs: dict[str, tuple[list[_Run], list[_Run]]] = {}
    for _ in range(_REPEATS):
        for size, (source, _, _) in enumerate(models):
            for name, run in _there_and_back(source):
                runs.setdefault(name, ([], []))[size].append(run)
    many, quarter = (num_tensors for _, _, num_tensors in models)
    ratio = many / quarter
    for name, (large, small) in runs.items():
        best = min(large)
        yield Row(
            name=f"convert {name}, {many} small tensors: {1e6 * best.seconds / many:.0f} us each, {best.cpu_seconds:.2f} s of CPU",
            seconds=best.seconds,
            peer=f"{ratio:.2f} times the seconds of {quarter} tensors",
            peer_seconds=ratio * min(small).seconds,
            target=1.25,
            peak_bytes=best.peak_bytes,
            peak_target=_PEAK,
        )


def _against_mbridge(source: Path, ours: _Run) -> Iterator[Row]:
    interpreter = os.environ.get("MINPRO_MBRIDGE_PYTHON")
    if interpreter is None:
        print("convert: no row for mbridge, as MINPRO_MBRIDGE_PYTHON names no interpreter that has it", file=sys.stderr)
        return
    command = [interpreter, str(Path(__file__).with_name("mbridge_process.py")), str(source)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(_REPEATS)]
    found = min((json.loads(run.splitlines()[-1]) for run in runs), key=lambda run: run["seconds"])
    yield Row(
        name="convert hf-to-megatron, the same",
        seconds=ours.seconds,
        peer=f"mbridge {found['version']} loading it into a model, {found['peak_bytes'] / 1e6:.0f} MB",
        peer_seconds=found["seconds"],
        target=1.0,
        peak_bytes=ours.peak_bytes,
        peak_target=found["peak_bytes"],
    )


def _there_and_back(source: Path) -> Iterator[tuple[str, _Run]]:
    """Each command once; what they write is removed, outside their time."""
    megatron, back = source.with_name("megatron"), source.with_name("back")
    yield "hf-to-megatron", run_convert(["hf-to-megatron", str(source), str(megatron)])
    yield "verify", run_convert(["verify", str(source), str(megatron)])
    yield "megatron-to-hf", run_convert(["megatron-to-hf", str(megatron), str(back)])
    shutil.rmtree(megatron)
    shutil.rmtree(back)


class _Run(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all threads
    peak_bytes: int


def run_convert(arguments: list[str]) -> _Run:
    """One `minpro convert`, in a process of its own."""
    process = Path(__file__).with_name("convert_process.py")
    done = subprocess.run([sys.executable, str(process), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"minpro convert {' '.join(arguments)}: {done.stderr.strip()[-500:]}")
    return _Run(**json.loads(done.stdout.splitlines()[-1]))


def _copy_and_sync(source: Path, destination: Path) -> float:
    """cp of a folder that the page cache holds, and its way to the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    subprocess.run(["sync", *destination.iterdir(), destination], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


def make_model(folder: Path, config: dict[str, Any]) -> tuple[Path, int, int]:
    """A random checkpoint: the folder, bytes of its tensors, their number. Every tensor is another part of one random block."""
    shapes = hf_shapes(Architecture.from_config(config, source="config"))
    largest = max(map(math.prod, shapes.values()))
    block = torch.randint(-(2**15), 2**15, (largest + len(shapes),), dtype=torch.int16).view(torch.bfloat16)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for start, (name, shape) in enumerate(shapes.items()):
            yield name, block[start : start + math.prod(shape)].view(shape)

    write_checkpoint(
        folder,
        tensors(),
        specs=[(name, shape, torch.bfloat16) for name, shape in shapes.items()],
        max_shard_bytes=500_000_000,
        extra_files={"config.json": json.dumps(config_with_both_spellings(config), indent=2).encode()},
    )
    return folder, 2 * sum(map(math.prod, shapes.values())), len(shapes)
