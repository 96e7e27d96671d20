"""Checks that a new server holds the weights of the folder that it loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rollout.sglang import control as sglang_control
from rollout.sglang.server import ServerPool
from rollout.weights.checksums import ChecksumMismatch, expected_checksums, server_checksums

# Tensors that a server keeps as they are in the folder.
_COMPARED = ("self_attn.o_proj.weight", "model.norm.weight")
_COMPARABLE_MODELS = ("qwen3", "qwen3_moe")
_MOST = 4
_TIMEOUT_S = 120.0


def check_pool(pool: ServerPool) -> None:
    """Prove that every server holds the weights of its model folder. Raises ChecksumMismatch, with all servers ended."""
    settings = pool.settings
    try:
        for endpoint in pool.endpoints:
            check_loaded(
                endpoint,
                settings.model_path,
                dtype=settings.dtype,
                exact=settings.device == "cpu" and settings.tp == 1,
                api_key=settings.api_key,
                admin_key=settings.admin_key,
            )
    except BaseException:
        pool.stop()
        raise


def check_loaded(endpoint: str, folder: Path, *, dtype: str, exact: bool, api_key: str | None = None, admin_key: str | None = None) -> None:
    """Compare a server with the folder it should serve: by its path, and by the checksums of a few tensors.

    Args:
        endpoint: http://host:port of a server that answers.
        folder: absolute; the Hugging Face folder it was started with.
        dtype: what the server computes in: float32, bfloat16 or float16.
        exact: the server hashes as this process does, on a CPU without tensor parallelism. Elsewhere only the path is compared.
        api_key, admin_key: of a server with keys.

    Raises:
        ChecksumMismatch: naming the endpoint and what differs.
    """
    served = sglang_control.call(endpoint, "/model_info", key=api_key, timeout_s=_TIMEOUT_S)["model_path"]
    if Path(served) != folder:
        raise ChecksumMismatch(f"{endpoint}: serves {served}, expected {folder}")
    config = json.loads((folder / "config.json").read_bytes())
    if not exact or config.get("model_type") not in _COMPARABLE_MODELS or config.get("quantization_config") is not None:
        return
    expected = expected_checksums(_compared_tensors(folder), dtype=getattr(torch, dtype))
    [held] = server_checksums(endpoint, api_key=api_key, admin_key=admin_key, timeout_s=_TIMEOUT_S)
    differing = [name for name, checksum in expected.items() if held.get(name) != checksum]
    if differing:
        raise ChecksumMismatch(f"{endpoint}: {differing[0]} and {len(differing) - 1} more of {len(expected)} tensors differ from {folder}")


def _compared_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The first of each kind, from the folder's files."""
    remaining = _MOST
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(name for name in file.keys() if name.endswith(_COMPARED)):  # noqa: SIM118  no mapping
                if remaining:
                    remaining -= 1
                    yield name, file.get_tensor(name)
