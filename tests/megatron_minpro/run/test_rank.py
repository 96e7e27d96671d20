"""What a trainer rank sets in its environment before CUDA and NCCL look."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.run.rank import set_environment
from rollout.sglang.environment import server_environment

NAMES = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")


@pytest.mark.parametrize("own", [None, "1"])
def test_ranks_and_servers_get_the_same_nccl_variables(own: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*NAMES, "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    if own is not None:  # the user's, for the whole job
        monkeypatch.setenv("NCCL_CUMEM_ENABLE", own)
    server = server_environment(tmp_path / "bin/python", device="cuda", num_threads=1, packages=tmp_path)
    set_environment(load_config(Path(__file__).resolve().parents[3] / "configs/tiny_moe_cpu.yaml", []))
    assert {name: os.environ[name] for name in NAMES} == {name: server[name] for name in NAMES}
    assert os.environ["NCCL_CUMEM_ENABLE"] == (own or "0") and os.environ["NCCL_NVLS_ENABLE"] == "0"
