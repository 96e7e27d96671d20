"""A checkpoint of the main job becomes a Hugging Face folder by one command that is told nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_minpro import cli

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]


def test_the_newest_checkpoint_converts_to_the_exported_policy(finished_run: dict[str, Any], tmp_path: Path) -> None:
    checkpoint, policy = finished_run["dir"] / "checkpoints/latest", finished_run["dir"] / "policy"
    assert cli.run(["convert", "megatron-to-hf", str(checkpoint), str(tmp_path / "out"), "--json"]) == 0
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", policy))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert cli.run(["convert", "verify", str(checkpoint), str(policy)]) == 0
    names = {path.name for path in policy.iterdir()} - {"model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (policy / name).read_bytes() for name in names)
