"""Random off-policy cases, and one way to run an objective over them however they are packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megatron_minpro.objectives import Objective, TokenBatch, add_metrics
from parallel.sequence_shard import SequenceShard
from parallel.top_tokens import ScoredTopTokens


@dataclass(frozen=True)
class Case:
    """A mini-batch, one tensor per sequence."""

    logprobs: list[Tensor]
    behaviour: list[Tensor]
    advantages: list[Tensor]
    masks: list[Tensor]
    corrections: list[Tensor] | None = None
    entropies: list[Tensor] | None = None  # None: 0.5 everywhere
    top: tuple[list[Tensor], list[Tensor]] | None = None  # log-probs of K tokens under pi_theta and pi_old, each [L, K]; None: not centred
    lag: int = 3

    @property
    def behaviour_entropies(self) -> list[Tensor]:
        return [torch.full_like(x, 0.5) for x in self.behaviour] if self.entropies is None else self.entropies

    @classmethod
    def of_ratios(cls, ratios: Sequence[float], advantages: Sequence[float] | float = 1.0) -> Case:
        """One fully trained sequence with pi_old = 1 / 4 and the given ratios."""
        logprobs = torch.tensor(ratios).log() + math.log(0.25)
        advantage = torch.as_tensor(advantages, dtype=torch.float32).expand(len(ratios)).clone()
        return cls([logprobs], [torch.full_like(logprobs, math.log(0.25))], [advantage], [torch.ones(len(ratios), dtype=torch.bool)])

    @classmethod
    def of_probabilities(cls, behaviour: Sequence[float], current: Sequence[float], advantages: Sequence[float] | float = 1.0) -> Case:
        """One fully trained sequence whose sampled tokens have these probabilities under pi_old and pi_theta."""
        advantage = torch.as_tensor(advantages, dtype=torch.float32).expand(len(current)).clone()
        logprobs, old = torch.tensor(current).log(), torch.tensor(behaviour).log()
        return cls([logprobs], [old], [advantage], [torch.ones(len(current), dtype=torch.bool)])

    @classmethod
    def random(cls, seed: int, spread: float = 0.5) -> Case:
        """Prompts in front, a tool span in the middle, one sequence without a trained token, one of a single token."""
        generator = torch.Generator().manual_seed(seed)
        lengths = (11, 1, 7, 16, 5, 9)
        masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
        masks[0][:3] = False
        masks[2][:] = False
        masks[3][:2] = False
        masks[3][6:10] = False
        masks[5][-2:] = False
        behaviour = [-2 * torch.rand(length, generator=generator) for length in lengths]
        logprobs = [b + spread * torch.randn(b.shape, generator=generator) for b in behaviour]
        advantages = [torch.randn(1, generator=generator).expand(length).clone() for length in lengths]
        entropies = [1.5 * torch.rand(length, generator=generator) for length in lengths]
        return cls(logprobs, behaviour, advantages, masks, entropies=entropies)

    @property
    def num_tokens(self) -> int:
        return int(sum(mask.sum() for mask in self.masks))

    @property
    def num_sequences(self) -> int:
        return sum(bool(mask.any()) for mask in self.masks)

    def centred(self, seed: int = 0, top_k: int = 3) -> Case:
        """The same case with top tokens, which hold a part of the probability in both policies."""
        generator = torch.Generator().manual_seed(seed)
        old = [(0.9 * torch.rand(len(mask), top_k, generator=generator).softmax(1)).log() for mask in self.masks]
        current = [(x + 0.3 * torch.randn(x.shape, generator=generator)) - 0.2 for x in old]
        return replace(self, top=(current, old))

    def batch(self, indices: Sequence[int], *, multiple_of: int = 1) -> tuple[TokenBatch, SequenceShard]:
        shard = SequenceShard.whole([len(self.masks[i]) for i in indices], multiple_of=multiple_of)
        batch = TokenBatch(
            logprobs_T=shard.local([self.logprobs[i] for i in indices], fill=math.nan).requires_grad_(),
            behaviour_logprobs_T=shard.local([self.behaviour[i] for i in indices], fill=math.nan),
            advantages_T=shard.local([self.advantages[i] for i in indices], fill=math.nan),
            loss_mask_T=shard.local([self.masks[i] for i in indices], fill=False),
            shard=shard,
            global_tokens=self.num_tokens,
            global_sequences=self.num_sequences,
            behaviour_entropies_T=shard.local([self.behaviour_entropies[i] for i in indices], fill=math.nan),
            lag=self.lag,
            correction_weights_T=None if self.corrections is None else shard.local([self.corrections[i] for i in indices], fill=math.nan),
            top=None if self.top is None else local_top(self.top, indices, shard),
        )
        return batch, shard

    def corrected(self, seed: int = 0) -> Case:
        """The same case with correction weights, a third of them 0."""
        generator = torch.Generator().manual_seed(seed)
        weights = [2 * torch.rand(mask.shape, generator=generator) for mask in self.masks]
        return replace(self, corrections=[torch.where(torch.rand(w.shape, generator=generator) < 0.3, 0.0, w) for w in weights])

    def with_garbage(self, value: float) -> Case:
        """The same case with `value` at every masked position of every stream."""

        def spoil(xs: list[Tensor]) -> list[Tensor]:
            return [x.where(mask, value) for x, mask in zip(xs, self.masks, strict=True)]

        return replace(
            self,
            logprobs=spoil(self.logprobs),
            behaviour=spoil(self.behaviour),
            advantages=spoil(self.advantages),
            entropies=spoil(self.behaviour_entropies),
            corrections=None if self.corrections is None else spoil(self.corrections),
        )


def local_top(top: tuple[list[Tensor], list[Tensor]], indices: Sequence[int], shard: SequenceShard) -> ScoredTopTokens:
    """The local rows of a case's top tokens, column by column. Padding holds NaN."""
    current, old = (
        torch.stack([shard.local([rows[i][:, k] for i in indices], fill=math.nan) for k in range(rows[0].size(1))], 1) for rows in top
    )
    return ScoredTopTokens(logprobs_TK=current.requires_grad_(), behaviour_logprobs_TK=old)


@dataclass(frozen=True)
class Ran:
    """What came out, summed over the micro-batches and put back in the order of the case."""

    loss: float
    weights: list[Tensor]
    gradients: list[Tensor]
    metrics: dict[str, Tensor]
    top_gradients: list[Tensor]  # [L, K] each; none where the case has no top tokens
    prefix_minima: list[Tensor]
    cumulative: list[Tensor]
    cuts: list[Tensor]


def run(objective: Objective, case: Case, micro_batches: Sequence[Sequence[int]] | None = None, *, multiple_of: int = 1) -> Ran:
    """The mini-batch of `case` in these micro-batches of sequence indices (default: all in one)."""
    micro_batches = micro_batches or [list(range(len(case.masks)))]
    batches = [case.batch(indices, multiple_of=multiple_of) for indices in micro_batches]
    statistics = sum(objective.minibatch_statistics(batch) for batch, _ in batches) if objective.needs_minibatch_statistics else None
    loss, weights, gradients, top_gradients, metrics = 0.0, {}, {}, {}, []
    prefix_minima, cumulative, cuts = {}, {}, {}
    for (batch, shard), indices in zip(batches, micro_batches, strict=True):
        out = objective(batch, statistics)
        gradient_T, *of_top = torch.autograd.grad(out.loss, [batch.logprobs_T, *([batch.top.logprobs_TK] if batch.top else [])])
        loss += out.loss.item()
        metrics.append(out.metrics)
        weights |= dict(zip(indices, shard.assemble(out.weights_T), strict=True))
        for values, x_T in ((prefix_minima, out.prefix_min_T), (cumulative, out.cumulative_T), (cuts, out.cut_T)):
            if x_T is not None:  # an objective of a user may not say them
                values |= dict(zip(indices, shard.assemble(x_T), strict=True))
        gradients |= dict(zip(indices, shard.assemble(gradient_T), strict=True))
        for gradient_TK in of_top:
            columns = [shard.assemble(x_T) for x_T in gradient_TK.unbind(1)]
            top_gradients |= {index: torch.stack(of_sequence, 1) for index, *of_sequence in zip(indices, *columns, strict=True)}
    order = range(len(case.masks))
    rows = [top_gradients[i] for i in order if i in top_gradients]
    by_token = ([values[i] for i in order if i in values] for values in (prefix_minima, cumulative, cuts))
    return Ran(loss, [weights[i] for i in order], [gradients[i] for i in order], add_metrics(metrics), rows, *by_token)


# One sequence's trained tokens in float64: log ratios, advantages, log-probs -> (weight, loss) per token, by a plain loop.
Reference = Callable[[list[float], list[float], list[float]], list[tuple[float, float]]]


def check(objective: Objective, reference: Reference, case: Case, *, divisor: str = "token_mean") -> None:
    """Weights, gradient and loss equal a float64 token-by-token reference, with the divisor that the reference's author counts."""
    ran = run(objective, case)
    loss = 0.0
    for s, mask in enumerate(case.masks):
        d = (case.logprobs[s].double() - case.behaviour[s].double())[mask].tolist()
        a = case.advantages[s].double()[mask].tolist()
        expected = reference(d, a, case.logprobs[s].double()[mask].tolist())
        if case.corrections is not None:
            expected = [(w * c, part * c) for (w, part), c in zip(expected, case.corrections[s].double()[mask].tolist(), strict=True)]
        count = {
            "token_mean": case.num_tokens,
            "seq_mean_token_mean": case.num_sequences * len(d),
            "seq_mean_token_sum": case.num_sequences,
            "constant": case.num_sequences * 7,
        }
        weight = torch.zeros(len(mask), dtype=torch.float64)
        gradient = torch.zeros(len(mask), dtype=torch.float64)
        weight[mask] = torch.tensor([w for w, _ in expected], dtype=torch.float64)
        gradient[mask] = torch.tensor([-w * x / count[divisor] for (w, _), x in zip(expected, a, strict=True)], dtype=torch.float64)
        loss += sum(part / count[divisor] for _, part in expected)
        # Log ratios are differences of fp32 numbers around 2: 2^-23 absolute, which exp and a sum of 16 make relative.
        torch.testing.assert_close(ran.weights[s].double(), weight, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ran.gradients[s].double(), gradient, rtol=1e-5, atol=1e-7)
    assert ran.loss == pytest.approx(loss, rel=1e-5, abs=1e-6)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ppo_token(r: float, a: float, low: float, high: float, dual_clip: float = math.inf) -> tuple[float, float]:
    """PPO's token in its own words: (gradient weight, loss)."""
    objective = min(r * a, clip(r, low, high) * a)
    flat = (a > 0 and r > high) or (a < 0 and r < low)
    if a < 0 and dual_clip * a > objective:
        objective, flat = dual_clip * a, True
    return (0.0 if flat else r), -objective


@pytest.fixture
def cases() -> type[Case]:
    return Case


@pytest.fixture
def run_objective() -> Callable[..., Ran]:
    return run


@pytest.fixture
def check_objective() -> Callable[..., None]:
    return check


@pytest.fixture
def ppo_reference() -> Callable[..., tuple[float, float]]:
    return ppo_token
