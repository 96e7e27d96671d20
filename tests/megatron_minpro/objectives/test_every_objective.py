"""What must hold for each objective: masks, packing, overflow, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_minpro.objectives import OBJECTIVES, NonFiniteTokenError, TokenBatch, make_objective
from megatron_minpro.objectives.aggregation import AGGREGATIONS
from parallel.sequence_shard import SequenceShard
from tests.megatron_minpro.objectives.variants import REQUIRED, VARIANTS, make

every_objective = pytest.mark.parametrize("objective", [make(variant) for variant in VARIANTS], ids=list(VARIANTS))


def assert_same(a, b, *, exactly: bool) -> None:
    close = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-6, "atol": 1e-9}
    # The loss is a sum of terms around 0.3 that nearly cancel: absolute in fp32.
    assert a.loss == pytest.approx(b.loss, rel=1e-6, abs=3e-7)
    for x, y in zip([*a.weights, *a.gradients], [*b.weights, *b.gradients], strict=True):
        torch.testing.assert_close(x, y, **close)
    assert a.metrics.keys() == b.metrics.keys()
    for name, value in a.metrics.items():
        torch.testing.assert_close(value, b.metrics[name], rtol=1e-6, atol=3e-7, msg=lambda m, n=name: f"{n}: {m}")


@every_objective
def test_what_stands_at_masked_tokens_changes_nothing(objective, cases, run_objective) -> None:
    case = cases.random(0, 0.7).corrected()
    clean = run_objective(objective, case)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        assert_same(clean, run_objective(objective, case.with_garbage(garbage)), exactly=True)


@every_objective
def test_order_packing_padding_and_micro_batches_change_nothing(objective, cases, run_objective) -> None:
    case = cases.random(1, 0.7).corrected()
    whole = run_objective(objective, case)
    for micro_batches in ([[5, 3, 1, 0, 4, 2]], [[0], [1], [2], [3], [4], [5]], [[2, 0, 5], [4], [3, 1]]):
        for multiple_of in (1, 8):
            assert_same(whole, run_objective(objective, case, micro_batches, multiple_of=multiple_of), exactly=False)


def assert_gradient_is_minus_weight_times_advantage_over_the_divisor(objective, case, ran) -> None:
    aggregation = objective.options.get("aggregation", "seq_mean_token_mean")
    for s, mask in enumerate(case.masks):
        divisor = {
            "token_mean": case.num_tokens,
            "seq_mean_token_mean": case.num_sequences * max(int(mask.sum()), 1),
            "seq_mean_token_sum": case.num_sequences,
        }[aggregation]
        expected = torch.where(mask, -ran.weights[s] * case.advantages[s] / divisor, 0.0)
        torch.testing.assert_close(ran.gradients[s], expected, rtol=3e-7, atol=0)  # two roundings of fp32
        assert ran.gradients[s][~mask].eq(0).all() and ran.weights[s][~mask].eq(0).all()


@every_objective
def test_gradient_is_minus_weight_times_advantage_over_the_divisor(objective, cases, run_objective) -> None:
    case = cases.random(2, 0.7)
    assert_gradient_is_minus_weight_times_advantage_over_the_divisor(objective, case, run_objective(objective, case))


@every_objective
def test_correction_weights_multiply_weight_gradient_and_loss_alone(objective, cases, run_objective) -> None:
    plain, corrected = cases.random(2, 0.7), cases.random(2, 0.7).corrected()
    before, after = run_objective(objective, plain), run_objective(objective, corrected)
    for s, mask in enumerate(plain.masks):
        factor = torch.where(mask, corrected.corrections[s], 0.0)
        torch.testing.assert_close(after.weights[s], before.weights[s] * factor, rtol=1e-6, atol=0)
        torch.testing.assert_close(after.gradients[s], before.gradients[s] * factor, rtol=1e-6, atol=0)
    # The loss is linear in the tokens' weights: shares of tokens that are corrected alone add up.
    first, alone = [torch.arange(len(x)) % 2 == 0 for x in corrected.corrections], 0.0
    for part in (first, [~x for x in first]):
        only = [torch.where(x, weights, 0.0) for x, weights in zip(part, corrected.corrections, strict=True)]
        alone += run_objective(objective, replace(plain, corrections=only)).loss
    assert after.loss == pytest.approx(alone, rel=1e-5, abs=1e-6)
    weighted = {"weight/mean", "weight/mean_square", "weight/vanished", "weight/by_place", "weight/by_share", "loss/policy"}
    for name in before.metrics.keys() - weighted:
        torch.testing.assert_close(after.metrics[name], before.metrics[name], rtol=0, atol=0)


@every_objective
def test_correction_weights_of_one_are_no_correction_bit_for_bit(objective, cases, run_objective) -> None:
    case = cases.random(2, 0.7)
    ones = replace(case, corrections=[torch.ones_like(x) for x in case.logprobs])
    plain, corrected = run_objective(objective, case), run_objective(objective, ones)
    assert plain.loss == corrected.loss
    for x, y in zip([*plain.weights, *plain.gradients], [*corrected.weights, *corrected.gradients], strict=True):
        assert torch.equal(x, y)


@every_objective
def test_only_the_policys_own_log_probs_carry_a_gradient(objective, cases) -> None:
    batch, _ = cases.random(2, 0.7).corrected().batch([0, 1, 2, 3, 4, 5])
    statistics = objective.minibatch_statistics(batch) if objective.needs_minibatch_statistics else None
    fixed = [
        x.requires_grad_()
        for x in (batch.behaviour_logprobs_T, batch.advantages_T, batch.correction_weights_T, batch.behaviour_entropies_T)
    ]
    out = objective(batch, statistics)
    assert torch.autograd.grad(out.loss, fixed, allow_unused=True, retain_graph=True) == (None,) * 4
    assert not out.weights_T.requires_grad and not any(value.requires_grad for value in out.metrics.values())


@every_objective
def test_on_policy_the_gradient_is_reinforce_and_nothing_is_clipped(objective, cases, run_objective) -> None:
    case = cases.random(3, 0.0)
    ran = run_objective(objective, case)
    weight = objective.options.get("scale", 1.0)
    for weights, mask in zip(ran.weights, case.masks, strict=True):
        assert torch.equal(weights, weight * mask.float())
    count = float(case.num_tokens)
    assert ran.metrics["clip/hard"].tolist() == ran.metrics["clip/soft"].tolist() == [0.0, count]
    assert ran.metrics["ratio/unit"].tolist() == ran.metrics["ratio/mean"].tolist() == [count, count]
    assert ran.metrics["policy/kl_to_behaviour"].tolist() == [0.0, count]


@every_objective
@pytest.mark.parametrize("size", [30.0, 88.0, 200.0])
@pytest.mark.parametrize("signs", [(-1, 2), (1, 2), (-1, 0)], ids=["both", "up", "down"])
def test_huge_log_ratios_give_finite_loss_gradient_and_metrics(objective, cases, run_objective, size: float, signs) -> None:
    case = cases.random(4, 1.0)
    generator = torch.Generator().manual_seed(0)
    for s, behaviour in enumerate(case.behaviour):
        case.logprobs[s] = behaviour + size * torch.randint(*signs, behaviour.shape, generator=generator)
    ran = run_objective(objective, case)
    assert math.isfinite(ran.loss)
    assert all(x.isfinite().all() for x in [*ran.weights, *ran.gradients, *ran.metrics.values()])
    assert_gradient_is_minus_weight_times_advantage_over_the_divisor(objective, case, ran)


@every_objective
def test_a_batch_without_a_trained_token_is_zero_and_keeps_its_graph(objective, cases, run_objective) -> None:
    case = cases.random(5)
    empty, _ = case.batch([2])
    statistics = objective.minibatch_statistics(empty) if objective.needs_minibatch_statistics else None
    out = objective(empty, statistics)
    (gradient,) = torch.autograd.grad(out.loss, empty.logprobs_T)
    assert out.loss == 0 and gradient.eq(0).all()
    assert all(value.eq(0).all() for value in out.metrics.values())


@every_objective
def test_metric_names_and_shapes_do_not_depend_on_the_batch(objective, cases, run_objective) -> None:
    shapes = [{k: (v.shape, v.dtype) for k, v in run_objective(objective, cases.random(seed)).metrics.items()} for seed in range(2)]
    assert shapes[0] == shapes[1]
    assert {dtype for _, dtype in shapes[0].values()} == {torch.float64}


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES.known) - {"gspo"}))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_divide_by_global_counts(name: str, aggregation: str, cases, run_objective) -> None:
    case = cases.random(6, 0.02)
    length = {"aggregation_length": 7} if aggregation == "constant" else {}
    objective = make_objective(name, aggregation=aggregation, **length, **REQUIRED.get(name, {}))
    ran = run_objective(objective, case, [[0, 2], [1, 3, 4], [5]])
    for s, mask in enumerate(case.masks):
        divisor = {
            "token_mean": case.num_tokens,
            "seq_mean_token_mean": 5 * max(int(mask.sum()), 1),
            "seq_mean_token_sum": 5,
            "constant": 5 * 7,
        }[aggregation]
        expected = torch.where(mask, -ran.weights[s] * case.advantages[s] / divisor, 0.0)
        torch.testing.assert_close(ran.gradients[s], expected, rtol=3e-7, atol=0)


def tokens(**changed: object) -> dict:
    given = {
        "logprobs_T": torch.full((4,), -1.0),
        "behaviour_logprobs_T": torch.full((4,), -1.0),
        "advantages_T": torch.ones(4),
        "loss_mask_T": torch.tensor([True, True, True, False]),
        "shard": SequenceShard.whole([2, 1], multiple_of=2) if "shard" not in changed else changed["shard"],
        "global_tokens": 3,
        "global_sequences": 2,
    }
    return given | changed


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logprobs_T": torch.zeros(4, dtype=torch.bfloat16)}, r"logprobs_T must be torch.float32, got torch.bfloat16"),
        ({"behaviour_logprobs_T": torch.zeros(4, dtype=torch.float64)}, r"behaviour_logprobs_T must be torch.float32, got torch.float64"),
        ({"advantages_T": torch.zeros(3)}, r"advantages_T must have shape \(4,\).* got \(3,\)"),
        ({"loss_mask_T": torch.ones(4)}, r"loss_mask_T must be torch.bool, got torch.float32"),
        ({"loss_mask_T": torch.ones(4, dtype=torch.bool)}, r"loss_mask_T is True at sequence 1, position 1, which is padding"),
        ({"correction_weights_T": torch.ones(4, dtype=torch.float64)}, r"correction_weights_T must be torch.float32, got torch.float64"),
        ({"correction_weights_T": torch.ones(3)}, r"correction_weights_T must have shape \(4,\).* got \(3,\)"),
        ({"global_tokens": 0}, r"global_tokens must be a whole number of at least 1, got 0"),
        ({"behaviour_entropies_T": torch.ones(3)}, r"behaviour_entropies_T must have shape \(4,\).* got \(3,\)"),
        ({"lag": -1}, r"lag must be a whole number of at least 0, got -1"),
        ({"global_sequences": 1.5}, r"global_sequences must be a whole number of at least 1, got 1.5"),
    ],
)
def test_a_wrong_batch_is_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatch(**tokens(**changed))


@pytest.mark.parametrize("name", ["logprobs_T", "behaviour_logprobs_T", "advantages_T", "correction_weights_T", "behaviour_entropies_T"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trained_token_that_is_not_finite_is_named(name: str, value: float) -> None:
    x_T = torch.tensor([-1.0, value, value, value])
    with pytest.raises(NonFiniteTokenError, match=rf"{name} is {value} at sequence 0, position 1 .*; 2 such tokens"):
        TokenBatch(**tokens(**{name: x_T}))
    TokenBatch(**tokens(**{name: torch.tensor([-1.0, -1.0, -1.0, value])}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minpor", {}, "objective.name = 'minpor': unknown; did you mean 'minpro'"),
        ("minpro", {"clip_hgih": 4.0}, "objective.clip_hgih = 4.0: minpro has no such option; did you mean 'clip_high'"),
        ("minpro", {"clip_high": -1.0}, "objective.name = 'minpro': clip_high must be a finite number of at least 0, got -1.0"),
        ("minpro", {"clip_high": "4"}, "clip_high must be a finite number of at least 0, got '4'"),
        ("grpo", {"dual_clip": 1.0}, "dual_clip must be a finite number above 1, got 1.0"),
        ("cispo", {"aggregation": "mean"}, "aggregation must be one of token_mean, .*; got 'mean'"),
        ("cispo", {"aggregation": "constant"}, "aggregation_length must be a whole number of at least 1"),
        ("cispo", {"aggregation_length": 9}, "aggregation_length=9 has no meaning with aggregation=token_mean"),
        ("m2po", {"rule": "papers"}, "rule must be one of paper, official, second_moment_all; got 'papers'"),
        ("m2po", {"budget": 0}, "budget must be a finite number above 0, got 0"),
        ("prefix_filter", {"fraction": 1.0}, "fraction must be below 1, got 1.0"),
        ("ctpo", {"max_log_ratio": 0.0}, "max_log_ratio must be a finite number above 0, got 0.0"),
        ("cppo", {"w_min": 1.1}, "w_min must be at most 1, got 1.1"),
        ("sat", {"quantile": 1.5}, "quantile must be at most 1, got 1.5"),
        ("dppo_tv", {"delta_high": 0}, "delta_high must be a finite number above 0, got 0"),
        ("estr", {"tau": 0}, "tau must be a finite number above 0, got 0"),
        ("masked_is", {"low": 2.0, "high": 1.5}, "high must be a finite number above 2.0, got 1.5"),
        ("drpo", {"epsilon": 0.0}, "epsilon must be a finite number above 0, got 0.0"),
        ("ema_kpo", {"noise_ratio": 0}, "noise_ratio must be a finite number above 0, got 0"),
        ("ctpo", {"max_log_ratio": 30.0}, "max_log_ratio must be at most 20.0, got 30.0"),
    ],
)
def test_wrong_names_and_options_are_refused_when_the_objective_is_made(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, **options)


TOKEN_MEAN = {"aggregation": "token_mean", "aggregation_length": None}
SEQUENCE_MEAN = {"aggregation": "seq_mean_token_mean", "aggregation_length": None}
MINPRO_WIDTHS = {"clip_low": 1.0, "clip_high": 4.0}


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("minpro", MINPRO_WIDTHS | TOKEN_MEAN),
        ("cispo", MINPRO_WIDTHS | TOKEN_MEAN),
        ("scaled_cispo", {"scale": 0.5} | MINPRO_WIDTHS | TOKEN_MEAN),
        ("grpo", {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": None} | TOKEN_MEAN),
        ("gspo", {"clip_low": 2e-3, "clip_high": 2e-3}),
        ("m2po", {"budget": 0.04, "rule": "paper"} | TOKEN_MEAN),
        (
            "ctpo",
            {"width_low": 0.025, "width_high": 0.05, "power": 0.5, "max_log_ratio": 10.0} | SEQUENCE_MEAN,
        ),
        (
            "topr",
            {"positive_low": 1.0, "positive_high": 1.0, "negative_low": 0.0, "negative_high": 1.0, "level": "sequence"}
            | {"aggregation": "seq_mean_token_sum", "aggregation_length": None},
        ),
        ("dppo_tv", {"delta_low": 0.15, "delta_high": 0.15} | TOKEN_MEAN),
        ("dppo_kl", {"delta_low": 0.05, "delta_high": 0.05} | TOKEN_MEAN),
        ("cppo", {"delta": 0.15, "delta_b": 0.015, "w_min": 0.8} | TOKEN_MEAN),
        ("a3po", {"clip_low": 0.2, "clip_high": 0.2} | TOKEN_MEAN),
        ("sat", {"clip_low": 0.2, "clip_high": 0.2, "quantile": 0.9} | TOKEN_MEAN),
        ("estr", {"tau": 1.6, "epsilon": 0.01, "clip_low": 0.2, "clip_high": 0.28} | TOKEN_MEAN),
        ("pnpo", {"clip_low": 7e-4, "clip_high": 9.5e-4} | SEQUENCE_MEAN),
        ("vespo", {"power_positive": 2.0, "decay_positive": 3.0, "power_negative": 3.0, "decay_negative": 2.0} | TOKEN_MEAN),
        ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05} | SEQUENCE_MEAN),
        ("ema_kpo", {"noise_ratio": 1e-6, "clip_low": 3e-4, "clip_high": 4e-4, "max_log_ratio": 10.0} | SEQUENCE_MEAN),
        ("drpo", {"epsilon": 12.5} | TOKEN_MEAN),
        ("prefix_ratio", MINPRO_WIDTHS | TOKEN_MEAN),
        ("prefix_filter", {"fraction": 0.01} | MINPRO_WIDTHS | TOKEN_MEAN),
        ("masked_is", {"low": 0.5, "high": 5.0} | TOKEN_MEAN),
        ("reinforce", TOKEN_MEAN),
    ],
)
def test_defaults_are_the_published_ones(name: str, defaults: dict) -> None:
    assert dict(make(name).options) == defaults


def test_given_options_replace_defaults_and_three_need_the_mini_batch() -> None:
    assert make_objective("minpro", clip_high=3.0).options["clip_high"] == 3.0
    assert [name for name in OBJECTIVES.known if make(name).needs_minibatch_statistics] == ["m2po", "sat", "prefix_filter"]
    assert [name for name in OBJECTIVES.known if make(name).needs_behaviour_entropies] == ["estr"]
