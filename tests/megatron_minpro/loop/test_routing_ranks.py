"""Batches that are scored, wait in files and are trained with the experts of their scoring pass: a real actor on real gloo ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollout.ports import free_ports
from tests.megatron_minpro.loop.diary import UPDATES
from tests.rank_pool import RankPool

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"world_size": 2, "ep": 2},
    "pp2": {"world_size": 2, "pp": 2},
    "cp2": {"world_size": 2, "cp": 2},
    "tp2": {"world_size": 2, "tp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def numbers(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each layout made of two batches with replay, and the first one without."""
    out = tmp_path_factory.mktemp("routing")
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 if "gate.weight" in name else 0.15)
    model.save_pretrained(out / "model")
    runs = [*((name, layout, "trainer") for name, layout in LAYOUTS.items()), ("none", LAYOUTS["ep2"], "none")]
    requests = [
        {"name": name, "port": port, "layout": layout, "replay": replay}
        for (name, layout, replay), port in zip(runs, free_ports("127.0.0.1", len(runs)), strict=True)
    ]
    (out / "requests.json").write_text(json.dumps(requests))
    ranks.run(Path(__file__).with_name("routing_ranks.py"), out / "model", out, world_size=2)
    return {name: json.loads((out / name / "numbers.json").read_text()) for name, _, _ in runs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_same_rows_and_trains_with_them(layout: str, numbers: dict[str, dict[str, Any]]) -> None:
    found, expected = numbers[layout], numbers["ep2"]
    assert found["files"] == ["step_000000.rows", "step_000001.rows"] and found["left"] == []
    assert found["rows"] == expected["rows"]
    assert found["counters"]["trained_batches"] == 2
    for ours, theirs in zip(found["trained"], expected["trained"], strict=True):
        assert ours["routing/missing"] == 0.0
        for name in ("loss/total", "update/grad_norm", "prefix_min/mean", "routing/differing", "routing/differing_lag_max"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-3), name
        # The ceiling of 1.1 cuts the tokens that are likelier in the policy than in the invented distribution, here nearly everywhere.
        assert ours["centering/active"] > 0.9 and ours["centering/drift"] > 0.02
        for name in ("centering/active", "centering/drift"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_sampler_was_certain_of_teaches_nothing(layout: str, numbers: dict[str, dict[str, Any]]) -> None:
    """The centering of a token's weight of 1 is then its own score, at its own place: on every layout the gradient is 0."""
    norms = numbers[layout]["grad_norms"]
    assert norms["wide"] > 0.1
    assert norms["reinforce"] < 1e-5 * norms["wide"]


def test_the_first_update_meets_its_own_experts_and_later_ones_do_not(numbers: dict[str, dict[str, Any]]) -> None:
    first, second = numbers["ep2"]["trained"]
    assert first["routing/differing_lag_min"] == 0.0 < first["routing/differing_lag_max"] < second["routing/differing_lag_max"] < 0.9
    assert first["routing/differing_lag_max"] < second["routing/differing_lag_min"]


def test_replay_leaves_scoring_and_changes_training(numbers: dict[str, dict[str, Any]]) -> None:
    replayed, live = numbers["ep2"], numbers["none"]
    assert replayed["scored"] == live["scored"] and live["files"] == []
    assert "routing/differing" not in live["trained"][0]
    assert replayed["trained"][1]["loss/total"] != live["trained"][1]["loss/total"]
    # The same experts in numerator and denominator: the ratios of the second batch, two updates later, fall less.
    assert replayed["trained"][1]["prefix_min/mean"] > live["trained"][1]["prefix_min/mean"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_tokens_are_those_that_the_objective_saw(layout: str, numbers: dict[str, dict[str, Any]]) -> None:
    """Prefix minima, products, weights and cuts of the recorded responses follow from their log-probs, by a float64 loop."""
    found, expected = numbers[layout]["tokens"], numbers["ep2"]["tokens"]
    names = sorted(response["sample_id"] for records in found for response in records["responses"])
    assert names == sorted(f"step{step}-{number}" for step in (0, 1) for number in range(4)), "two groups of two, each response once"
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: ours[name] for name in ours if name != "streams"} == {name: theirs[name] for name in theirs if name != "streams"}
        assert ours["lag"] == ours["policy_version"] == UPDATES * (ours["global_step"] - 1) + ours["update"]
        streams, start = ours["streams"], 0
        assert streams["token_ids"] == theirs["streams"]["token_ids"]
        for name in ("logprobs", "behaviour_logprobs", "entropy"):
            assert streams[name] == pytest.approx(theirs["streams"][name], abs=2e-2), name
        for response in ours["responses"]:
            smallest, product = 0.0, 0.0
            for t in range(start, start + response["num_response_tokens"]):
                log_ratio = streams["logprobs"][t] - streams["behaviour_logprobs"][t]
                product += log_ratio
                weight = math.exp(log_ratio + smallest)
                assert streams["prefix_min"][t] == pytest.approx(smallest, abs=1e-6)
                assert streams["cumulative"][t] == pytest.approx(product, abs=1e-5)
                assert streams["weights"][t] == pytest.approx(min(weight, 1.1), rel=1e-5)
                if abs(weight - 1.1) > 1e-5:
                    assert streams["cut"][t] == (2 if weight > 1.1 else 0)
                smallest = log_ratio if t == start else min(smallest, log_ratio)
            start += response["num_response_tokens"]
        assert start == len(streams["logprobs"])
