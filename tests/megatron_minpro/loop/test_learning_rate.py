from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_minpro.config import load_config
from megatron_minpro.loop.learning_rate import base_model_rate, sample_size_factor, training_rate
from megatron_minpro.objectives.effective_sample_size import weight_sums

TINY = Path(__file__).resolve().parents[3] / "configs/tiny_moe_cpu.yaml"


def test_the_rate_rises_over_the_warm_up_and_stays() -> None:
    updates = ["actor.optimizer.learning_rate=0.6", "actor.updates_per_step=2"]
    actor = load_config(TINY, [*updates, "actor.optimizer.warm_up_steps=3"]).actor  # 6 optimizer steps
    assert [training_rate(actor, version) for version in range(8)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert training_rate(load_config(TINY, [*updates, "actor.optimizer.warm_up_steps=0"]).actor, 0) == 0.6


def sums(weights: list[float]) -> dict[str, torch.Tensor]:
    ones_N = torch.ones(len(weights), dtype=torch.float64)
    return {"effective_sample_size/prefix/weight_sums": weight_sums(torch.tensor(weights).log(), ones_N)}


@pytest.mark.parametrize(
    ("weights", "factor", "settings"),
    [
        ([1, 1, 1, 1], 1.0, ""),
        ([4, 1, 0.5, 0.5], 0.71714, ""),
        ([100, 1, 1, 1], 0.51492, ""),
        ([4, 1, 0.5, 0.5], 0.51429, "exponent: 1.0"),
        ([4, 1, 0.5, 0.5], 1.0, "base: 0.5"),
        ([100, 1, 1, 1], (0.26515 / 0.5) ** 0.5, "base: 0.5"),
    ],
)
def test_the_rate_shrinks_with_the_effective_sample_size(weights: list[float], factor: float, settings: str) -> None:
    config = load_config(TINY, [f"actor.optimizer.sample_size={{level: prefix, {settings}}}"]).actor.optimizer.sample_size
    assert config is not None and sample_size_factor(config, sums(weights)) == pytest.approx(factor, abs=1e-5)
    with pytest.raises(FloatingPointError, match=r"effective_sample_size/prefix of the mini-batch is no number"):
        sample_size_factor(config, {name: 0 * value for name, value in sums(weights).items()})


def test_the_rate_of_a_base_model_by_hand() -> None:
    warm_up = load_config(TINY, ["model.warm_up.num_steps=1000", "model.warm_up.learning_rate=2.0"]).model.warm_up
    assert warm_up is not None
    rate = [base_model_rate(warm_up, step) for step in range(1000)]
    assert rate[0] == pytest.approx(2.0 / 50)
    # Half way: 1/20 + 19/20 * 1/2.
    assert rate[500] == pytest.approx(2.0 * 0.525)
    # A quarter of the way, cos(pi / 4) = 0.70711.
    assert rate[250] == pytest.approx(2.0 * (0.05 + 0.95 * (1 + 0.5**0.5) / 2))
    assert rate[999] == pytest.approx(2.0 * 0.05, rel=1e-3)
    assert max(rate) < 2.0
    assert all(a < b for a, b in pairwise(rate[:50]))
    assert all(a > b for a, b in pairwise(rate[50:]))
