"""Score centering against vectors by hand, its defining property in float64, and a plain loop over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_minpro.objectives import OBJECTIVES, NonFiniteTokenError, Objective, TokenBatch, make_objective, with_score_centering
from megatron_minpro.objectives.registry import check_score_centering
from megatron_minpro.objectives.score_centering import LogMass, center, clipped, masked
from megatron_minpro.registry import PlugInError
from parallel.sequence_shard import SequenceShard
from parallel.top_tokens import ScoredTopTokens

OBJECTIVES_THAT_CENTRE = {
    "reinforce": make_objective("reinforce"),
    "cispo": make_objective("cispo", clip_high=0.28),
    "cispo with a lower bound": make_objective("cispo", clip_low=0.3, clip_high=0.2),
    "scaled_cispo": make_objective("scaled_cispo", scale=0.7, clip_high=0.1),
    "masked_is": make_objective("masked_is", low=0.7, high=1.5),
    "minpro": make_objective("minpro", clip_high=0.1, aggregation="seq_mean_token_mean"),
    "prefix_ratio": make_objective("prefix_ratio", clip_high=0.5),
}


def vocabulary_batch(logits_TV: Tensor, log_q_TV: Tensor, token_ids: Tensor, lengths: list[int], *, top_k: int, **changed) -> TokenBatch:
    """Every position of these sequences was sampled from q; its `top_k` likeliest tokens are known."""
    log_p_TV = logits_TV.log_softmax(1)
    top = log_q_TV.topk(top_k, 1)
    given = {
        "logprobs_T": log_p_TV.gather(1, token_ids[:, None])[:, 0],
        "behaviour_logprobs_T": log_q_TV.gather(1, token_ids[:, None])[:, 0],
        "advantages_T": torch.ones(len(token_ids)),
        "loss_mask_T": torch.ones(len(token_ids), dtype=torch.bool),
        "shard": SequenceShard.whole(lengths),
        "global_tokens": len(token_ids),
        "global_sequences": len(lengths),
        "top": ScoredTopTokens(logprobs_TK=log_p_TV.gather(1, top.indices), behaviour_logprobs_TK=top.values),
    }
    return TokenBatch(**given | changed)


# ------------------------------------------------------------------------------------------------------------------- by hand

Q, P = torch.tensor([0.6, 0.2, 0.15, 0.05]), torch.tensor([0.5, 0.2, 0.2, 0.1])


def golden(objective: Objective, *, earlier: float | None = None, top_k: int = 2) -> tuple[list[float], list[float], list[float], dict]:
    """Of a position with the distributions Q and P: c on the top tokens, the centering's gradient in the logits, weights, metrics.

    Each of the four tokens is sampled once, in a sequence of its own. earlier: the ratio of a token before it.
    """
    before = [] if earlier is None else [0]
    row = [*before, 0]
    weights, at = [], len(before)
    for token in range(4):
        q = torch.stack([torch.tensor([0.25 / earlier, *[(1 - 0.25 / earlier) / 3] * 3]) if earlier else Q] * len(before) + [Q])
        p = torch.stack([torch.full((4,), 0.25)] * len(before) + [P])
        logits = p.log().requires_grad_()
        ids = torch.tensor([*row[:-1], token])
        plain = vocabulary_batch(logits, q.log(), ids, [len(row)], top_k=top_k, top=None)
        batch = vocabulary_batch(logits, q.log(), ids, [len(row)], top_k=top_k)
        out = objective(batch)
        c, whole = torch.autograd.grad(out.loss, (batch.top.logprobs_TK, logits), retain_graph=True)
        (without,) = torch.autograd.grad(objective(plain).loss, logits)
        weights.append(float(out.weights_T[at]))
    # The loss has +c log p, and its mean over len(row) tokens.
    return (c[at] * len(row)).tolist(), ((whole - without)[at] * len(row)).tolist(), weights, out.metrics


def close(*values: float) -> object:
    return pytest.approx(list(values), abs=2e-5)


def test_without_a_correction_the_whole_gap_between_q_and_p_is_taken_off() -> None:
    c, drift, weights, metrics = golden(make_objective("reinforce"))
    assert c == close(0.26667, 0.06667)
    assert drift == close(0.1, 0.0, -0.06667, -0.03333)
    assert weights == [1.0] * 4
    assert metrics["centering/active"].tolist() == [1.0, 1.0]
    assert metrics["centering/drift"].tolist() == close(0.1 + 0.06667 + 0.03333, 1.0)
    assert golden(make_objective("reinforce"), top_k=4)[1] == close(0.1, 0.0, -0.05, -0.05)  # q - p itself


def test_a_narrow_ceiling_leaves_a_drift_that_is_taken_off() -> None:
    c, _, weights, _ = golden(make_objective("cispo", clip_high=0.28))
    assert (c, weights) == (close(0.07333, 0.02933), close(0.83333, 1.0, 1.28, 1.28))
    assert golden(make_objective("cispo", clip_high=0.28), top_k=4)[1] == close(0.022, 0.0088, 0.0008, -0.0316)


@pytest.mark.parametrize("objective", [make_objective("cispo", clip_high=1.0), make_objective("masked_is")], ids=lambda x: x.name)
def test_where_nothing_is_truncated_nothing_is_taken_off(objective: Objective) -> None:
    c, drift, weights, metrics = golden(objective)
    assert c == drift[:2] == [0.0, 0.0] and weights == close(0.83333, 1.0, 1.33333, 2.0)
    assert metrics["centering/active"].tolist() == metrics["centering/drift"].tolist() == [0.0, 1.0]


def test_minpro_takes_off_what_its_ceiling_cuts_behind_a_likelier_prefix() -> None:
    assert golden(make_objective("minpro", clip_high=0.28), earlier=2.0)[0] == close(0.34133, 0.08533)
    for earlier in (0.5, 2.0):
        assert golden(make_objective("minpro"), earlier=earlier)[0] == [0.0, 0.0]


def test_the_first_token_of_minpro_is_centred_as_cispo() -> None:
    assert golden(make_objective("minpro", clip_high=0.28))[:3] == golden(make_objective("cispo", clip_high=0.28))[:3]


# ------------------------------------------------------------------------------------------------------------------- the property

MASSES = {
    "1": lambda u_T: clipped(torch.zeros_like(u_T), torch.zeros_like(u_T), torch.zeros_like(u_T)),
    "min(r, 1.2)": lambda u_T: clipped(torch.zeros_like(u_T), torch.full_like(u_T, -math.inf), torch.full_like(u_T, math.log(1.2))),
    "clip(u r, 0.8, 1.1)": lambda u_T: clipped(u_T, torch.full_like(u_T, math.log(0.8)), torch.full_like(u_T, math.log(1.1))),
    "mask": lambda u_T: masked(log_low=math.log(0.9), log_high=math.log(1.3)),
}


@pytest.mark.parametrize("name", MASSES)
def test_with_the_whole_vocabulary_the_expected_gradient_is_0(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(50, 11, generator=generator, dtype=torch.float64).requires_grad_()
    log_q_TV = (logits_TV.detach() + 0.8 * torch.randn(50, 11, generator=generator, dtype=torch.float64)).log_softmax(1)
    log_mass: LogMass = MASSES[name](torch.randn(50, generator=generator, dtype=torch.float64))
    log_p_TV = logits_TV.log_softmax(1)
    everything = ScoredTopTokens(logprobs_TK=log_p_TV, behaviour_logprobs_TK=log_q_TV)
    centering = center(torch.ones(50, dtype=torch.bool), everything, log_mass, scale=1.0)
    # E_q[w_a log p_a] = sum_v q_v f(p_v / q_v) log p_v, of a constant advantage.
    expected_T = (log_mass(log_p_TV.detach(), log_q_TV).exp() * log_p_TV).sum(1)
    (without,) = torch.autograd.grad(expected_T.sum(), logits_TV, retain_graph=True)
    (gradient,) = torch.autograd.grad((expected_T - centering.term_T).sum(), logits_TV)
    assert without.abs().amax(1).max() > 0.1 and gradient.abs().max() < 1e-15
    torch.testing.assert_close(centering.drift_T, without.abs().sum(1))


@pytest.mark.parametrize("name", OBJECTIVES_THAT_CENTRE)
def test_expected_gradients_of_objectives_are_0_too(name: str) -> None:
    """Every token of a vocabulary of 7 after one prefix, each as often as q draws it."""
    generator = torch.Generator().manual_seed(2)
    prefix, last = torch.randn(7, generator=generator), torch.randn(7, generator=generator)
    logits = torch.stack([prefix, last]).requires_grad_()
    log_q = (logits.detach() + 0.5 * torch.randn(2, 7, generator=generator)).log_softmax(1)
    found = {}
    for top_k in (None, 7):
        expected = torch.zeros(2, 7)
        for token in range(7):
            kept = {} if top_k else {"top": None}
            batch = vocabulary_batch(logits, log_q, torch.tensor([3, token]), [2], top_k=7, **kept)
            (gradient,) = torch.autograd.grad(OBJECTIVES_THAT_CENTRE[name](batch).loss, logits)
            expected += log_q[1, token].exp() * gradient
        found[top_k] = float(expected[1].abs().max())
    assert found[None] > 1e-3 and found[7] < 3e-7  # fp32


# ------------------------------------------------------------------------------------------------------------------- a plain loop


def weight_of(objective: Objective, ratios: list[float], t: int) -> Callable[[float], float]:
    """f at token t, of ratios up to there."""
    options = objective.options
    low, high = 1 - options.get("clip_low", 0), 1 + options.get("clip_high", 0)
    if objective.name == "masked_is":
        return lambda r: r if options["low"] <= r <= options["high"] else 0.0
    factor = {"minpro": min(ratios[:t], default=1.0), "prefix_ratio": math.prod(ratios[:t])}.get(objective.name, 1.0)
    if objective.name == "reinforce":
        return lambda r: 1.0
    return lambda r: options.get("scale", 1.0) * min(max(factor * r, low), high)


def loop(objective: Objective, p: list[list[float]], q: list[list[float]], ids: list[int], top_k: int) -> list[tuple[float, list[float]]]:
    """Of each token of one sequence: the sampled one's weight, and c on q's likeliest tokens."""
    ratios = [p[t][a] / q[t][a] for t, a in enumerate(ids)]
    found = []
    for t, token in enumerate(ids):
        f = weight_of(objective, ratios, t)
        head = sorted(range(len(q[t])), key=lambda v: -q[t][v])[:top_k]
        rho = max(1 - sum(q[t][v] for v in head), 1e-6) / max(1 - sum(p[t][v] for v in head), 1e-6)
        alpha = rho * f(1 / rho)
        found.append((f(p[t][token] / q[t][token]), [q[t][v] * f(p[t][v] / q[t][v]) - alpha * p[t][v] for v in head]))
    return found


LENGTHS = [6, 1, 9, 4]
MASKS = [torch.tensor(row) for row in ([False, False, True, True, True, True], [True], [True] * 3 + [False] * 3 + [True] * 3, [False] * 4)]


def masked_case(garbage: float) -> dict:
    """Prompts, a tool's span, a sequence that nothing is trained of; `garbage` at every masked position."""
    generator = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    logits = 1.5 * torch.randn(total, 12, generator=generator)
    log_q = (logits + 0.6 * torch.randn(total, 12, generator=generator)).log_softmax(1)
    ids = torch.multinomial(log_q.exp(), 1, generator=generator)[:, 0]
    mask = torch.cat(MASKS)
    advantages = torch.randn(4, generator=generator).repeat_interleave(torch.tensor(LENGTHS))
    return {"logits": logits, "log_q": log_q, "ids": ids, "mask": mask, "advantages": advantages, "garbage": garbage}


def gradients(objective: Objective, case: dict, micro_batches: list[list[int]], *, top_k: int = 5) -> tuple[float, Tensor, Tensor, dict]:
    """Loss, gradients on the sampled token and on the top ones, metrics of the case in these micro-batches of sequences."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    loss, of_sampled, of_top, metrics = 0.0, torch.zeros(sum(LENGTHS)), torch.zeros(sum(LENGTHS), top_k), []
    log_p, mask = case["logits"].log_softmax(1), case["mask"]
    top = case["log_q"].topk(top_k, 1)

    def spoiled(x: Tensor) -> Tensor:
        return torch.where(mask if x.dim() == 1 else mask[:, None], x, case["garbage"])

    streams = {
        "logprobs_T": spoiled(log_p.gather(1, case["ids"][:, None])[:, 0]),
        "behaviour_logprobs_T": spoiled(case["log_q"].gather(1, case["ids"][:, None])[:, 0]),
        "advantages_T": spoiled(case["advantages"]),
        "loss_mask_T": mask,
    }
    tops = (spoiled(log_p.gather(1, top.indices)), spoiled(top.values))
    for indices in micro_batches:
        here = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices])
        current = tops[0][here].requires_grad_()
        batch = TokenBatch(
            **{name: (x[here].requires_grad_() if name == "logprobs_T" else x[here]) for name, x in streams.items()},
            shard=SequenceShard.whole([LENGTHS[i] for i in indices]),
            global_tokens=int(mask.sum()),
            global_sequences=3,
            top=ScoredTopTokens(logprobs_TK=current, behaviour_logprobs_TK=tops[1][here]),
        )
        out = objective(batch)
        of_sampled[here], of_top[here] = torch.autograd.grad(out.loss, (batch.logprobs_T, current))
        loss += out.loss.item()
        metrics.append(out.metrics)
    return loss, of_sampled, of_top, {name: sum(each[name] for each in metrics) for name in metrics[0]}


@pytest.mark.parametrize("name", OBJECTIVES_THAT_CENTRE)
def test_gradients_equal_a_float64_loop_over_tokens_and_vocabulary(name: str) -> None:
    objective, case = OBJECTIVES_THAT_CENTRE[name], masked_case(math.nan)
    p, q = case["logits"].double().log_softmax(1).exp(), case["log_q"].double().exp()
    expected_sampled, expected_top, start, active = torch.zeros(20).double(), torch.zeros(20, 5).double(), 0, 0
    for length, mask in zip(LENGTHS, MASKS, strict=True):
        trained = start + mask.nonzero()[:, 0]
        rows = loop(objective, p[trained].tolist(), q[trained].tolist(), case["ids"][trained].tolist(), 5)
        divisor = 3 * len(trained) if objective.options["aggregation"] == "seq_mean_token_mean" else int(case["mask"].sum())
        for t, (weight, c) in zip(trained.tolist(), rows, strict=True):
            factor = float(case["advantages"][t]) / divisor
            expected_sampled[t], expected_top[t] = -weight * factor, factor * torch.tensor(c, dtype=torch.float64)
            active += any(abs(x) > 1e-12 for x in c)
        start += length
    loss, of_sampled, of_top, metrics = gradients(objective, case, [[0, 1, 2, 3]])
    torch.testing.assert_close(of_sampled.double(), expected_sampled, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_top.double(), expected_top, rtol=1e-5, atol=1e-7)
    assert metrics["centering/active"].tolist() == [active, 11.0] and active > 0
    assert math.isfinite(loss) and metrics["centering/drift"][0] > 0


@pytest.mark.parametrize("name", OBJECTIVES_THAT_CENTRE)
def test_packing_micro_batches_and_masked_values_change_nothing(name: str) -> None:
    objective = OBJECTIVES_THAT_CENTRE[name]
    loss, *whole, metrics = gradients(objective, masked_case(0.0), [[0, 1, 2, 3]])
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        for micro_batches in ([[3, 1, 0, 2]], [[2], [0, 3], [1]]):
            other_loss, *others, other_metrics = gradients(objective, masked_case(garbage), micro_batches)
            assert other_loss == pytest.approx(loss, rel=1e-6, abs=3e-7)
            for x, y in zip(whole, others, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
            for metric, value in metrics.items():
                torch.testing.assert_close(value, other_metrics[metric], rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("name", OBJECTIVES_THAT_CENTRE)
def test_probabilities_that_underflow_leave_everything_finite(name: str) -> None:
    """SGLang writes the smallest fp32 number for a log-prob of -inf."""
    logits = torch.tensor([[0.0, -300.0, -1.0, -400.0], [200.0, 0.0, -200.0, -1.0]]).requires_grad_()
    log_q = torch.tensor([[-1e-7, -20.0, torch.finfo(torch.float32).min, -300.0], [-300.0, -1e-7, -18.0, torch.finfo(torch.float32).min]])
    for top_k in (1, 2, 4):
        batch = vocabulary_batch(logits, log_q, torch.tensor([0, 1]), [2], top_k=top_k)
        out = OBJECTIVES_THAT_CENTRE[name](batch)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        assert out.loss.isfinite() and gradient.isfinite().all() and all(x.isfinite().all() for x in out.metrics.values())


# ------------------------------------------------------------------------------------------------------------------- refusals


def test_objectives_that_look_beyond_the_tokens_own_ratio_are_refused() -> None:
    centred = [name for name in OBJECTIVES.known if make_objective(name, **({"scale": 1} if name == "scaled_cispo" else {})).centers_scores]
    assert centred == ["minpro", "cispo", "scaled_cispo", "prefix_ratio", "masked_is", "reinforce"]
    for name in centred:
        check_score_centering(make_objective(name, **({"scale": 1} if name == "scaled_cispo" else {})))
    with pytest.raises(
        PlugInError, match=r"^objective.name = 'gspo': its scores cannot be centred; expected .* null, or one of minpro, ci"
    ):
        check_score_centering(make_objective("gspo"))
    for name in ("grpo", "pnpo", "sapo", "topr"):
        with pytest.raises(ValueError, match="this objective's weight cannot be centred"):
            make_objective(name)(vocabulary_batch(P[None].log(), Q[None].log(), torch.tensor([0]), [1], top_k=2))


def test_an_objective_that_says_it_centres_and_does_not_is_refused() -> None:
    @with_score_centering
    def quiet(batch: TokenBatch):
        return make_objective("reinforce")(replace(batch, top=None))

    with pytest.raises(PlugInError, match="says that it centres scores and did not"):
        check_score_centering(replace(make_objective("reinforce"), function=quiet, options={}))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("top", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 2)), r"must have one shape, got \[2, 3\] and \[2, 2\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), r"top.logprobs_TK must be torch.float32 of shape \[2, K\], got torch.float32 \[3, 2\]"),
        ((torch.zeros(2, 2), torch.zeros(2, 2).double()), r"top.behaviour_logprobs_TK must be torch.float32 of shape"),
        ((torch.zeros(2, 0), torch.zeros(2, 0)), r"\[2, K\], got torch.float32 \[2, 0\]"),
    ],
)
def test_top_tokens_of_another_shape_are_refused(top: tuple[Tensor, Tensor], message: str) -> None:
    rows = torch.stack([P, P]).log()
    with pytest.raises(ValueError, match=message):
        scored = ScoredTopTokens(logprobs_TK=top[0], behaviour_logprobs_TK=top[1])
        vocabulary_batch(rows, rows, torch.tensor([0, 0]), [2], top_k=2, top=scored)


def test_top_tokens_that_are_not_finite_or_beside_corrections_are_refused() -> None:
    rows = torch.stack([P, P]).log()
    bad = torch.tensor([[-1.0, -2.0], [-1.0, math.nan]])
    for pair, name in (((bad, -bad.nan_to_num()), "logprobs_TK"), ((-bad.nan_to_num(), bad), "behaviour_logprobs_TK")):
        top = ScoredTopTokens(logprobs_TK=pair[0], behaviour_logprobs_TK=pair[1])
        with pytest.raises(NonFiniteTokenError, match=rf"top\.{name} is nan at sequence 0, position 1"):
            vocabulary_batch(rows, rows, torch.tensor([0, 0]), [2], top_k=2, top=top)
    with pytest.raises(ValueError, match="top and correction_weights_T: expected one of them"):
        vocabulary_batch(rows, rows, torch.tensor([0, 0]), [2], top_k=2, correction_weights_T=torch.ones(2))
