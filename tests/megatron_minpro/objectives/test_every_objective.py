"""What must hold for each objective: masks, packing, overflow, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_minpro.objectives import OBJECTIVES, NonFiniteTokenError, TokenBatch, make_objective
from megatron_minpro.objectives.aggregation import AGGREGATIONS
from parallel.sequence_shard import SequenceShard

ALL = [make_objective(name, **({"scale": 0.5} if name == "scaled_cispo" else {})) for name in OBJECTIVES]
PPO_FORM = {"grpo", "gspo", "ctpo"}
every_objective = pytest.mark.parametrize("objective", ALL, ids=lambda objective: objective.name)


def assert_same(a, b, *, exactly: bool) -> None:
    close = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-6, "atol": 1e-9}
    assert a.loss == pytest.approx(b.loss, rel=1e-6, abs=1e-9)
    for x, y in zip([*a.weights, *a.gradients], [*b.weights, *b.gradients], strict=True):
        torch.testing.assert_close(x, y, **close)
    assert a.metrics.keys() == b.metrics.keys()
    for name, value in a.metrics.items():
        torch.testing.assert_close(value, b.metrics[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_objective
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_masked_tokens_changes_nothing(objective, cases, run_objective, garbage: float) -> None:
    case = cases.random(0, 0.7)
    assert_same(run_objective(objective, case), run_objective(objective, case.with_garbage(garbage)), exactly=True)


@every_objective
@pytest.mark.parametrize("micro_batches", [[[5, 3, 1, 0, 4, 2]], [[0], [1], [2], [3], [4], [5]], [[2, 0, 5], [4], [3, 1]]])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_order_packing_padding_and_micro_batches_change_nothing(objective, cases, run_objective, micro_batches, multiple_of: int) -> None:
    case = cases.random(1, 0.7)
    assert_same(run_objective(objective, case), run_objective(objective, case, micro_batches, multiple_of=multiple_of), exactly=False)


@every_objective
def test_gradient_is_minus_weight_times_advantage_over_the_divisor(objective, cases, run_objective) -> None:
    case = cases.random(2, 0.7)
    ran = run_objective(objective, case)
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
def test_on_policy_the_gradient_is_reinforce_and_nothing_is_clipped(objective, cases, run_objective) -> None:
    case = cases.random(3, 0.0)
    ran = run_objective(objective, case)
    weight = 0.5 if objective.name == "scaled_cispo" else 1.0
    for weights, mask in zip(ran.weights, case.masks, strict=True):
        assert torch.equal(weights, weight * mask.float())
    count = float(case.num_tokens)
    assert ran.metrics["hard_clip_fraction"].tolist() == ran.metrics["soft_clip_fraction"].tolist() == [0.0, count]
    assert ran.metrics["unit_ratio_fraction"].tolist() == ran.metrics["ratio"].tolist() == [count, count]
    assert ran.metrics["kl_to_behaviour"].tolist() == [0.0, count]


@every_objective
@pytest.mark.parametrize("size", [30.0, 88.0, 200.0])
def test_huge_log_ratios_give_finite_loss_gradient_and_metrics(objective, cases, run_objective, size: float) -> None:
    case = cases.random(4, 1.0)
    signs = torch.Generator().manual_seed(0)
    for s, behaviour in enumerate(case.behaviour):
        case.logprobs[s] = behaviour + size * torch.randint(-1, 2, behaviour.shape, generator=signs)
    ran = run_objective(objective, case)
    assert math.isfinite(ran.loss)
    assert all(x.isfinite().all() for x in [*ran.weights, *ran.gradients, *ran.metrics.values()])


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


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"gspo"}))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_divide_by_global_counts(name: str, aggregation: str, cases, run_objective) -> None:
    case = cases.random(6, 0.02)
    options = {"scale": 1.0} if name == "scaled_cispo" else {}
    length = {"aggregation_length": 7} if aggregation == "constant" else {}
    ran = run_objective(make_objective(name, aggregation=aggregation, **length, **options), case, [[0, 2], [1, 3, 4], [5]])
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logprobs_T": torch.zeros(4, dtype=torch.bfloat16)}, r"logprobs_T must be torch.float32, got torch.bfloat16"),
        ({"behaviour_logprobs_T": torch.zeros(4, dtype=torch.float64)}, r"behaviour_logprobs_T must be torch.float32, got torch.float64"),
        ({"advantages_T": torch.zeros(3)}, r"advantages_T must have shape \(4,\).* got \(3,\)"),
        ({"loss_mask_T": torch.ones(4)}, r"loss_mask_T must be torch.bool, got torch.float32"),
        ({"loss_mask_T": torch.ones(4, dtype=torch.bool)}, r"loss_mask_T is True at sequence 1, position 1, which is padding"),
        ({"global_tokens": 0}, r"global_tokens must be a whole number of at least 1, got 0"),
        ({"global_sequences": 1.5}, r"global_sequences must be a whole number of at least 1, got 1.5"),
    ],
)
def test_a_wrong_batch_is_refused_by_name(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatch(**tokens(**changed))


@pytest.mark.parametrize("name", ["logprobs_T", "behaviour_logprobs_T", "advantages_T"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trained_token_that_is_not_finite_is_named(name: str, value: float) -> None:
    x_T = torch.tensor([-1.0, value, value, value])
    with pytest.raises(NonFiniteTokenError, match=rf"{name} is {value} at sequence 0, position 1 .*; 2 such tokens"):
        TokenBatch(**tokens(**{name: x_T}))
    TokenBatch(**tokens(**{name: torch.tensor([-1.0, -1.0, -1.0, value])}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minpor", {}, "unknown objective 'minpor'; did you mean 'minpro'"),
        ("minpro", {"clip_hgih": 4.0}, "objective 'minpro' has no option 'clip_hgih'; did you mean 'clip_high'"),
        ("minpro", {"clip_high": -1.0}, "objective 'minpro': clip_high must be a finite number of at least 0, got -1.0"),
        ("minpro", {"clip_high": "4"}, "clip_high must be a finite number of at least 0, got '4'"),
        ("grpo", {"dual_clip": 1.0}, "dual_clip must be a finite number above 1, got 1.0"),
        ("cispo", {"aggregation": "mean"}, "aggregation must be one of token_mean, .*; got 'mean'"),
        ("cispo", {"aggregation": "constant"}, "aggregation_length must be a whole number of at least 1"),
        ("cispo", {"aggregation_length": 9}, "aggregation_length=9 has no meaning with aggregation=token_mean"),
        ("m2po", {"rule": "papers"}, "rule must be one of paper, official, second_moment_all; got 'papers'"),
        ("m2po", {"budget": 0}, "budget must be a finite number above 0, got 0"),
        ("prefix_filter", {"fraction": 1.0}, "fraction must be below 1, got 1.0"),
        ("ctpo", {"max_log_ratio": 30.0}, "max_log_ratio must be at most 20.0, got 30.0"),
    ],
)
def test_wrong_names_and_options_are_refused_when_the_objective_is_made(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(name, **options)


def test_options_are_complete_and_show_the_published_defaults() -> None:
    assert dict(make_objective("minpro", clip_high=3.0).options) == {
        "clip_low": 1.0,
        "clip_high": 3.0,
        "aggregation": "token_mean",
        "aggregation_length": None,
    }
    assert [objective.name for objective in ALL if objective.needs_minibatch_statistics] == ["m2po", "prefix_filter"]
