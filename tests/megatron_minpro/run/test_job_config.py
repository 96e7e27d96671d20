"""What a job script settles first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.run.job_config import settle

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs/tiny_moe_cpu.yaml"


def test_the_resolved_configuration_stands_in_the_run_folder(tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", "name=job", "seed=5", f"model.path={tmp_path / 'model'}"]
    assert settle(TINY, settings) == tmp_path / "job"
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
def test_settings_that_cannot_work_end_in_one_line_and_write_nothing(settings: list[str], words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_minpro.run.job_config", str(TINY), f"output_dir={tmp_path}", "name=job", *settings]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert refused.returncode == 2
    assert refused.stderr.startswith("minpro: error: ") and words in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "job").exists()
