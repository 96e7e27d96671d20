"""`make bench-gpu` without a GPU: it says so; and in tiny, it runs to its end and agrees with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("gpu.py")


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path: Path) -> None:
    out = run("--out", str(tmp_path))
    assert out.splitlines() == [f"bench-gpu: no CUDA device (torch {torch.__version__}); nothing measured"]
    assert list(tmp_path.iterdir()) == []


def test_in_tiny_everything_runs_and_the_file_names_date_and_device(tmp_path: Path) -> None:
    out = run("--out", str(tmp_path), "--smoke")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["smoke"] is True
    assert written["date"].startswith("20")
    assert written["device"] in written["capabilities"][0]
    parity, scan, head, step = written["measurements"]
    assert max(parity["logprobs"], parity["gradients"]) < 1e-5
    assert scan["ratio"] > 0
    assert head["logits_bytes"] == 4 * 64 * 96
    # 2 x 3 x (4 layers x (128 x 16 x 24 attention + 128 x (8 + 3 x 2 x 64) experts + 8 x 16 x 32 scores) + 512 x 128 head) per token
    flops = 6 * (4 * (49_152 + 50_176 + 4_096) + 65_536) * 128
    assert step["tflops_per_s"] * step["seconds"] * 1e12 == pytest.approx(flops)
    assert len(out.splitlines()) == 4
