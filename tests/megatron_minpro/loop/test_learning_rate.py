from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.loop.learning_rate import base_model_rate, training_rate

TINY = Path(__file__).resolve().parents[3] / "configs/tiny_moe_cpu.yaml"


def test_the_rate_rises_over_the_warm_up_and_stays() -> None:
    updates = ["actor.optimizer.learning_rate=0.6", "actor.updates_per_step=2"]
    actor = load_config(TINY, [*updates, "actor.optimizer.warm_up_steps=3"]).actor  # 6 optimizer steps
    assert [training_rate(actor, version) for version in range(8)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    assert training_rate(load_config(TINY, [*updates, "actor.optimizer.warm_up_steps=0"]).actor, 0) == 0.6


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
