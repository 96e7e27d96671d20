"""Variables that a trainer rank sets before it touches CUDA, and nobody inherits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from parallel import cuda_environment
from parallel.layout import ParallelLayout

ALONE, TENSOR = ParallelLayout(world_size=2, ep=2), ParallelLayout(world_size=2, tp=2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cuda_environment.cuda_environment(TENSOR, deterministic=True):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards, whatever `enter` does
        monkeypatch.delenv(name)
    monkeypatch.setattr(cuda_environment, "_set_here", {})


def test_deterministic_runs_have_a_workspace_for_cublas() -> None:
    cuda_environment.enter(ALONE, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_order_of_kernels_is_kept_where_products_hide_collectives() -> None:
    cuda_environment.enter(TENSOR, deterministic=False)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_rank_sets_them_before_torch_is_imported() -> None:
    program = "import sys, megatron_minpro.run.rank; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_users_value_stays_and_ours_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    cuda_environment.enter(TENSOR, deterministic=True)
    inherited = cuda_environment.without_ours(os.environ)
    assert os.environ["PYTORCH_ALLOC_CONF"] == inherited["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"
    assert os.environ.keys() - inherited.keys() == {
        "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    }  # fmt: skip
