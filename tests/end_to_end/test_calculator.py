"""A conversation with a tool on the real stack: ten global steps of the calculator task, one rank, one server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.tasks.calculator.environment import CALL, reply
from tests.end_to_end.conftest import Command, metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(600)]


def models_words(said: str) -> list[str]:
    """A conversation's words without the calculator's, which answers every question as `reply` does."""
    words, kept, begin = said.split(), [], 0
    at = 0
    while at < len(words):
        kept.append(words[at])
        at += 1
        if words[at - 1] == CALL:
            answer = reply(" ".join(words[begin:at]), modulus=10).split()
            assert words[at : at + len(answer)] in (answer, []), f"{said!r} at word {at}"  # nothing follows where it was cut off
            at = begin = at + len(answer)
    return kept


def test_ten_steps_with_a_calculator_train_the_models_tokens_alone(new_minpro: Callable[..., Command], tmp_path: Path) -> None:
    settings = [
        f"output_dir={tmp_path}",
        f"model.path={tmp_path / 'base'}",
        "model.warm_up.num_steps=120",
        "evaluation=null",
        "debug.check_weights=true",  # server and trainer agree on the log-probs behind the calculator's words too
    ]
    command = new_minpro("train", "configs/tiny_calculator_cpu.yaml", *settings)
    code, _, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    run_dir = tmp_path / "tiny_calculator_cpu"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["rollouts_sampled"], summary["rollouts_trained"]) == (1280, 1280)
    sampled = [[json.loads(line) for line in (run_dir / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()] for step in range(10)]
    asked = [record for records in sampled for record in records if CALL in record["response"].split()]
    assert len(asked) > 300
    solved = [record for record in asked if record["reward"] == 1.0]
    hidden = [record["num_response_tokens"] - len(models_words(record["response"])) - 1 for record in solved]  # 1: the end token
    assert min(hidden) == 0 and hidden.count(0) > 0.9 * len(hidden)  # more only where the model wrote special tokens, which texts leave out
    trained = {int(row["batch/sampled_at_step"]): row["batch/tokens"] for row in metrics_of(run_dir) if "batch/tokens" in row}
    assert trained == {step: sum(record["num_response_tokens"] for record in records) for step, records in enumerate(sampled)}
