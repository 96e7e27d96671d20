"""Real input: DAPO-Math-17K, the Qwen3 tokenizer with its 151,936 tokens, math-verify in its worker process; two global steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command, metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(1200)]


def test_two_global_steps_on_dapo_math_17k(minpro: Callable[..., Command], assets: Path, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", f"model.path={tmp_path / 'base'}"]
    command = minpro("train", "configs/tiny_moe_dapo.yaml", *settings, MINPRO_ASSETS=str(assets))
    code, _, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    run_dir = tmp_path / "tiny_moe_dapo"
    log = (run_dir / "logs/train.log").read_text()
    assert "17,917 rows" in log and "17,255 distinct questions" in log
    assert "12 questions" in log  # those whose rows disagree on the answer
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["rollouts_sampled"] == summary["rollouts_trained"] == 32
    record = json.loads((run_dir / "rollouts/step_000000.jsonl").read_text().splitlines()[0])
    assert record["prompt"].startswith("Solve the following math problem step by step.")
    entropies = [row["entropy"] for row in metrics_of(run_dir) if "entropy" in row]
    # A random model over V tokens is nearly uniform: ln 151,936 = 11.93.
    assert entropies and all(entropy == pytest.approx(11.93, abs=0.05) for entropy in entropies)
