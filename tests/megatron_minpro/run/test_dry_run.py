"""The dry run says what would happen, and does nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_minpro.config import load_config
from megatron_minpro.run.dry_run import describe

REPOSITORY = Path(__file__).resolve().parents[3]
SETTINGS = (
    "num_global_steps=40",
    "staleness=2",
    "actor.updates_per_step=16",
    "rollout.prompts_per_step=32",
    "rollout.group_size=8",
    "model.warm_up.num_steps=1000",
)


def shown(folder: Path, *overrides: str) -> str:
    paths = [f"output_dir={folder}/runs", f"model.path={folder}/model", "name=test"]
    text = io.StringIO()
    Console(file=text, width=200).print(
        describe(load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*paths, *overrides]), resume="auto")
    )
    assert list(folder.iterdir()) == []
    return text.getvalue()


def test_a_dry_run_shows_every_ranks_place_and_starts_nothing(tmp_path: Path) -> None:
    text = shown(tmp_path, "world_size=4", "parallel.ep=2", "parallel.pp=2", *SETTINGS)
    assert "4 trainer ranks" in text
    rows = [line.strip("│ ").replace("│", " ").split() for line in text.splitlines() if line.startswith("│")]
    #                  rank tp cp dp pp etp ep edp
    assert [row for row in rows if len(row) == 8][-4:] == [
        ["0", "0", "0", "0", "0", "0", "0", "0"],
        ["1", "0", "0", "1", "0", "0", "1", "0"],
        ["2", "0", "0", "0", "1", "0", "0", "0"],
        ["3", "0", "0", "1", "1", "0", "1", "0"],
    ]
    assert f"fork of megatron_minpro.run.rank {tmp_path}/runs/test train" in text
    assert "staleness 2: policy lag 32 to 47 updates" in text
    assert "40 global steps x 16 updates of 16 responses" in text
    assert "2 layers of 64, 8 experts, to be made in 1000 supervised steps" in text


def test_a_model_on_another_machine_is_said_to_be_unchecked(tmp_path: Path) -> None:
    assert "not on this machine, so its shape and the layout's fit are not checked" in shown(tmp_path, "model.warm_up=null")


def test_a_dry_run_of_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ep=3 does not divide 8 experts"):
        shown(tmp_path, "world_size=3", "parallel.ep=3")
