"""Run folders that no run has made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.config import dump_config, load_config


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a run with these rewards, one for each trained batch, after a step that only samples."""

    def write(name: str, *overrides: str, rewards: tuple[float, ...] = (0.25, 0.5), complete: bool | None = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = load_config("tiny_moe_cpu", [f"name={name}", f"output_dir={tmp_path}", *overrides])
        (folder / "config.yaml").write_text(dump_config(config))
        lines: list[dict[str, Any]] = [{"global_step": 0, "time/step": 1.0, "reward/sampled": 0.9}]
        for index, reward in enumerate(rewards):
            line = {"reward/trained": reward, "batch/lag_min": 4.0 * index, "batch/lag_max": 4.0 * index + 2, "batch/tokens": 100}
            lines.append({"global_step": index + 1, "time/step": 2.0, **line})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if complete is not None:
            (folder / "result.json").write_text(json.dumps({"complete": complete, "seconds": {"update": 3.0}}))
        for label, value in (("step_000002", 0.5), ("before", 0.25), ("after", 0.375)):
            (folder / f"evaluation_{label}.json").write_text(json.dumps({"pass_at_1": value, "policy_version": 3}))
        return folder

    return write
