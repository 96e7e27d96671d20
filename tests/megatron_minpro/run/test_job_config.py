"""What a job script settles first."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro import cli
from megatron_minpro.config import load_config

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs/tiny_moe_cpu.yaml"


def test_the_resolved_configuration_stands_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"output_dir={tmp_path}", "name=job", "seed=5", f"model.path={tmp_path / 'model'}"]
    assert cli.run(["train", str(TINY), "--prepare", *settings]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'job'}\n"
    assert load_config(tmp_path / "job/config.yaml", []) == load_config(TINY, settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sed=5"], "command line: unknown key sed; did you mean seed?"),
        (["parallel.ep=2", "parallel.tp=3"], "tp"),
        (["megatron.moe_gruped=true"], "moe_gruped"),
        (["model.path=absent", "model.warm_up=null"], "model.path: absent does not exist"),
    ],
)
def test_settings_that_cannot_work_end_in_one_line_and_write_nothing(
    settings: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", str(TINY), "--prepare", f"output_dir={tmp_path}", "name=job", *settings]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minpro: error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "job").exists()
