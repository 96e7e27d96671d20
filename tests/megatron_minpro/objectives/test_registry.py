"""Objectives of the user's own, named by import path: they train like the ones of the package."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_minpro.objectives import make_objective

CLIPPED = """
import torch
from megatron_minpro.objectives import ObjectiveOutput

def clipped(batch, *, bound=5.0):
    ratio_T = (batch.logprobs_T.detach() - batch.behaviour_logprobs_T).exp()
    weights_T = torch.where(batch.loss_mask_T, ratio_T.clamp(0, bound), 0)
    loss_T = torch.where(batch.loss_mask_T, -weights_T * batch.advantages_T * batch.logprobs_T, 0)
    return ObjectiveOutput(loss=loss_T.sum() / batch.global_tokens, weights_T=weights_T, metrics={})
"""

CENTRED = """
import torch
from megatron_minpro.objectives import ObjectiveOutput, with_minibatch_statistics

def total(batch, **options):
    return torch.where(batch.loss_mask_T, batch.logprobs_T.detach(), 0).double().sum().reshape(1)

@with_minibatch_statistics(total)
def centred(batch, statistics, *, scale):
    mean = (statistics[0] / batch.global_tokens).float()
    weights_T = torch.where(batch.loss_mask_T, scale * (batch.logprobs_T.detach() - mean), 0)
    loss_T = torch.where(batch.loss_mask_T, -weights_T * batch.advantages_T * batch.logprobs_T, 0)
    return ObjectiveOutput(loss=loss_T.sum() / batch.global_tokens, weights_T=weights_T, metrics={})
"""


@pytest.mark.parametrize("seed", range(2))
def test_an_outside_objective_has_the_gradient_of_its_formula(cases, run_objective, users_module: Callable[[str], str], seed: int) -> None:
    case = cases.random(seed, 1.5)
    ours = run_objective(make_objective("cispo"), case)  # the same formula, checked against a loop in test_cispo.py
    theirs = run_objective(make_objective(f"{users_module(CLIPPED)}:clipped"), case, [[0, 1, 2], [3, 4, 5]])
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5, abs=1e-6)
    for expected, gradient, mask in zip(ours.gradients, theirs.gradients, case.masks, strict=True):
        torch.testing.assert_close(gradient[mask], expected[mask], rtol=1e-5, atol=1e-7)  # sums in another order
    assert sum(gradient.abs().sum() for gradient in theirs.gradients) > 0


def test_an_outside_objective_may_ask_for_statistics_of_the_mini_batch(cases, run_objective, users_module: Callable[[str], str]) -> None:
    case = cases.random(3)
    ran = run_objective(make_objective(f"{users_module(CENTRED)}:centred", scale=2.0), case, [[0, 3], [1, 2, 4, 5]])
    trained = torch.cat([logprobs[mask] for logprobs, mask in zip(case.logprobs, case.masks, strict=True)])
    for logprobs, weights, mask in zip(case.logprobs, ran.weights, case.masks, strict=True):
        torch.testing.assert_close(weights[mask], 2 * (logprobs - trained.mean())[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (CLIPPED, {"bounds": 1}, r"^objective.bounds = 1: \w+:clipped has no such option; did you mean 'bound'"),
        (CENTRED.replace("centred", "clipped"), {}, "^objective.name = .*: needs the option scale"),
        ("def clipped(batch): return 3", {}, "^objective.name = .*: returned a int, expected an ObjectiveOutput"),
        ("def clipped(batch): raise RuntimeError('no')", {}, "^objective.name = .*: no$"),
        ("def clipped(): pass", {}, "^objective.name = .*: takes 0 arguments by position, expected 1 before its options"),
        ("def other(batch): pass", {}, "^objective.name = .*has no 'clipped'"),
    ],
)
def test_an_outside_objective_that_cannot_work_is_refused(
    users_module: Callable[[str], str], text: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(f"{users_module(text)}:clipped", **options)


def test_the_readmes_objective_works_as_printed(cases, run_objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).resolve().parents[3] / "megatron_minpro/objectives/README.md"
    (printed,) = re.findall(r"```python\n(# my_objectives\.py.*?)```", readme.read_text(), flags=re.DOTALL)
    (tmp_path / "my_objectives.py").write_text(printed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_objectives", raising=False)
    assert "`objective.name=my_objectives:half_minpro objective.power=0.3`" in readme.read_text()
    ran = run_objective(make_objective("my_objectives:half_minpro", power=0.3), cases.of_ratios([2, 3, 1.5, 0.5, 9]))
    expected = torch.tensor([2, 3 * 2**0.3, 1.5 * 2**0.3, 0.5 * 1.5**0.3, math.exp(1.6)])  # the last one is bounded
    torch.testing.assert_close(ran.weights[0], expected, rtol=1e-5, atol=0)
