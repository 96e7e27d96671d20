"""Server arguments that move what is drawn and not the log-probs are refused by name; they still stand in SGLang's sources."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.sglang.environment import default_server_python
from rollout.sglang.top_token_limits import _LIMITS, check_top_token_limits


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preferred_sampling_params": '{"regex": "a"}'}, r"^sglang\.preferred_sampling_params = .*: a grammar or a bias .* no such key$"),
        ({"speculative-algorithm": "EAGLE3"}, r"^sglang\.speculative-algorithm = 'EAGLE3': its thresholds"),
        ({"enable_watermark": True}, r"^sglang\.enable_watermark = True: log-probs are those before the watermark"),
        ({"disaggregation_mode": "decode"}, r"^sglang\.disaggregation_mode = 'decode': .* expected null$"),
    ],
)
def test_what_score_centering_cannot_stand_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_top_token_limits(options)


def test_values_that_change_nothing_are_accepted() -> None:
    check_top_token_limits({"enable_watermark": False, "disaggregation_mode": "null", "mem_fraction_static": 0.8})


def test_sglang_still_knows_these_arguments_and_the_scaled_log_probs() -> None:
    [package] = (default_server_python().parent.parent / "lib").glob("python3*/site-packages/sglang/srt")
    names = (package / "arg_groups/field_order.py").read_text()
    assert all(f'"{name}"' in names for name in _LIMITS)
    sampler = (package / "layers/sampler.py").read_text()
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in sampler and "logits.div_(sampling_info.temperatures)" in sampler
