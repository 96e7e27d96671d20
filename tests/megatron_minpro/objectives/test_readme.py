"""The golden vectors of megatron_minpro/objectives/README.md are what the code computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_minpro.objectives import OBJECTIVES, TokenBatch, make_objective
from parallel.sequence_shard import SequenceShard

README = Path(__file__).resolve().parents[3] / "megatron_minpro/objectives/README.md"
# One token's ratios with pi_theta = 1, and probabilities under pi_old and pi_theta.
RATIOS = ([1 / ratio for ratio in (2, 3, 1.5, 0.5, 4)], [1.0] * 5)
PROBABILITIES = ([0.5, 0.2, 0.02, 0.6, 0.1, 0.9], [0.8, 0.1, 0.06, 0.35, 0.35, 0.45])
ROWS = [
    (match[1], float(match[2]), [float(value) for value in match[3].split("|")])
    for match in re.finditer(r"^\| `([^`]+)` \| (-?1) \| ([-\d. |]+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
]


def test_the_readme_has_a_vector_of_every_objective_but_a_control() -> None:
    assert len(ROWS) == 25
    assert {call.split()[0] for call, _, _ in ROWS} == set(OBJECTIVES.known) - {"scaled_cispo", "prefix_filter"}


@pytest.mark.parametrize(("call", "advantage", "weights"), ROWS, ids=[f"{call}{advantage:+.0f}" for call, advantage, _ in ROWS])
def test_golden_vector(call: str, advantage: float, weights: list[float]) -> None:
    behaviour, current = RATIOS if len(weights) == 5 else PROBABILITIES
    batch = TokenBatch(
        logprobs_T=torch.tensor(current).log().requires_grad_(),
        behaviour_logprobs_T=torch.tensor(behaviour).log(),
        advantages_T=torch.full((len(weights),), advantage),
        loss_mask_T=torch.ones(len(weights), dtype=torch.bool),
        shard=SequenceShard.whole([len(weights)]),
        global_tokens=len(weights),
        global_sequences=1,
        behaviour_entropies_T=torch.full((len(weights),), 0.5),
        lag=3,
    )
    name, *options = call.split()
    objective = make_objective(name, **{key: float(value) for key, _, value in (option.partition("=") for option in options)})
    statistics = objective.minibatch_statistics(batch) if objective.needs_minibatch_statistics else None
    torch.testing.assert_close(objective(batch, statistics).weights_T, torch.tensor(weights), rtol=1e-4, atol=0)
