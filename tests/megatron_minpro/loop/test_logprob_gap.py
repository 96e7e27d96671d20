"""How large a difference between server and trainer is accepted, for each pair of dtypes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop.logprob_gap import LogprobGapTooLarge, check_every_token, check_gap, gap_warning, limit

REPOSITORY = Path(__file__).resolve().parents[3]
BOTH_BFLOAT16 = ("model.dtype=bfloat16", "rollout.dtype=bfloat16")


def config(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", list(overrides))


def test_a_logit_of_ten_explains_the_limit_of_bfloat16_alone() -> None:
    logits = torch.linspace(-10, 10, 1001, dtype=torch.float64)
    exact = logits.log_softmax(-1)
    rounded = {dtype: (logits.to(dtype).double().log_softmax(-1) - exact).abs().mean() for dtype in (torch.bfloat16, torch.float32)}
    assert 1e-4 < rounded[torch.bfloat16] < limit(config(*BOTH_BFLOAT16))
    assert rounded[torch.float32] < 1e-2 * limit(config())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 1e-4),
        (BOTH_BFLOAT16, 0.05),
        (("rollout.dtype=bfloat16", "behaviour_logprobs=engine"), 0.05),
        (("rollout.max_logprob_gap=0.5",), 0.5),
    ],
)
def test_the_limit_follows_the_coarser_dtype_or_the_setting(overrides: tuple[str, ...], expected: float) -> None:
    assert limit(config(*overrides)) == expected


@pytest.mark.parametrize(
    ("overrides", "mean", "passes"),
    [
        ((), 3e-7, True),
        ((), 0.9e-4, True),
        ((), 1.1e-4, False),
        (BOTH_BFLOAT16, 0.049, True),
        (BOTH_BFLOAT16, 0.051, False),
        ((), math.nan, False),
    ],
)
def test_a_mean_gap_beyond_rounding_stops_the_run(overrides: tuple[str, ...], mean: float, passes: bool) -> None:
    line = {"engine_logprob_gap/mean": mean}
    if passes:
        check_gap(line, config(*overrides))
        return
    with pytest.raises(LogprobGapTooLarge, match=r"rollout\.max_logprob_gap allows"):
        check_gap(line, config(*overrides))
    warned = config(*overrides, "rollout.logprob_gap_action=warn")
    check_gap(line, warned)
    assert gap_warning(line, warned) is not None


def test_a_sampled_step_without_a_finite_gap_is_warned_of() -> None:
    assert "differ by nan" in str(gap_warning({"engine_logprob_gap/mean": None}, config()))
    assert gap_warning({"batch/tokens": 3.0}, config()) is None


@pytest.mark.parametrize(
    ("gaps", "passes"),
    [
        ([0.00009] * 1000, True),
        ([0.00011] * 1000, False),
        ([3e-7] * 995 + [2e-3] * 5, True),  # five tokens whose experts' gates tie
        ([3e-7] * 985 + [2e-3] * 15, False),
        ([0.0] * 999 + [float("nan")], False),
    ],
)
def test_in_a_checked_run_nearly_every_token_must_agree(gaps: list[float], passes: bool) -> None:
    checked = config("debug.check_weights=true")
    check_every_token(torch.tensor(gaps), config())
    check_every_token(torch.tensor(gaps), config("debug.check_weights=true", *BOTH_BFLOAT16))
    if passes:
        check_every_token(torch.tensor(gaps), checked)
        return
    with pytest.raises(LogprobGapTooLarge, match=r"^debug\.check_weights: server and trainer log-probs differ by "):
        check_every_token(torch.tensor(gaps), checked)
