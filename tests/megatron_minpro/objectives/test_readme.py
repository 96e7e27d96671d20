"""The golden vectors of megatron_minpro/objectives/README.md are what the code computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_minpro.objectives import TokenBatch, make_objective
from parallel.sequence_shard import SequenceShard

README = Path(__file__).resolve().parents[3] / "megatron_minpro/objectives/README.md"
ROWS = [
    (match[1], float(match[2]), [float(value) for value in match[3].split("|")])
    for match in re.finditer(r"^\| `(\w+)` \| (-?1) \| ([\d. |]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
]


def test_the_readme_lists_ten_vectors() -> None:
    assert len(ROWS) == 10


@pytest.mark.parametrize(("name", "advantage", "weights"), ROWS, ids=[f"{name}{advantage:+.0f}" for name, advantage, _ in ROWS])
def test_golden_vector(name: str, advantage: float, weights: list[float]) -> None:
    batch = TokenBatch(
        logprobs_T=torch.zeros(5, requires_grad=True),
        behaviour_logprobs_T=-torch.tensor([2, 3, 1.5, 0.5, 4]).log(),
        advantages_T=torch.full((5,), advantage),
        loss_mask_T=torch.ones(5, dtype=torch.bool),
        shard=SequenceShard.whole([5]),
        global_tokens=5,
        global_sequences=1,
    )
    objective = make_objective(name)
    statistics = objective.minibatch_statistics(batch) if objective.needs_minibatch_statistics else None
    torch.testing.assert_close(objective(batch, statistics).weights_T, torch.tensor(weights), rtol=1e-4, atol=0)
