"""Real input: DAPO-Math-17K, the Qwen3 tokenizer with its 151,936 tokens, math-verify in its worker process; two global steps.

With DAPO's dynamic sampling and overlong shaping and a correction for the server's log-probs. A random model is never right, so that all
groups are equal: every step samples twice, drops one half and trains the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command, metrics_of

OPTIONS = [
    "rollout.dynamic_sampling={equal: correct, max_rounds: 2}",
    "reward.overlong={max_tokens: 32, buffer_tokens: 16}",
    "corrections.truncated_is.max_weight=2.0",
]
pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(2400)]


def test_two_global_steps_on_dapo_math_17k(new_minpro: Callable[..., Command], assets: Path, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", f"model.path={tmp_path / 'base'}", *OPTIONS]
    command = new_minpro("train", "configs/tiny_moe_dapo.yaml", *settings, MINPRO_ASSETS=str(assets))
    code, _, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    run_dir = tmp_path / "tiny_moe_dapo"
    log = (run_dir / "logs/train.log").read_text()
    assert "17,917 rows" in log and "17,188 distinct questions" in log
    assert "12 questions" in log  # those whose rows disagree on the answer
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["rollouts_sampled"], summary["rollouts_trained"], summary["rollouts_dropped"]) == (64, 32, 32)
    records = [json.loads(line) for line in (run_dir / "rollouts/step_000000.jsonl").read_text().splitlines()]
    assert records[0]["prompt"].startswith("Solve the following math problem step by step.")
    assert [record["dropped"] is None for record in records] == [True] * 16 + [False] * 16
    assert len({record["prompt_id"] for record in records}) == 8
    for record in records:
        assert record["reward"] == pytest.approx(-max(0, record["num_response_tokens"] - 16) / 16)
    rows = metrics_of(run_dir)
    sampled = [row for row in rows if "rollout/rounds" in row]
    assert [(row["rollout/rounds"], row["rollout/equal_groups"], row["rollout/dropped"]) for row in sampled] == [(2, 4, 16)] * 2
    # float32 on both sides: the same probabilities up to rounding.
    assert [row["correction/weight"] for row in sampled] == pytest.approx([1.0, 1.0], abs=1e-3)
    entropies = [row["policy/entropy"] for row in rows if "policy/entropy" in row]
    # A random model over V tokens is nearly uniform: ln 151,936 = 11.93.
    assert entropies and all(entropy == pytest.approx(11.93, abs=0.05) for entropy in entropies)
