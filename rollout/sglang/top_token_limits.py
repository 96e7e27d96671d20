"""Server arguments with which the most likely tokens that SGLang returns are not those that it draws from. Read in SGLang 0.5.23.

A request states temperature, top_p, top_k, min_p and penalties (generate.py), and server_environment sets SGLANG_RETURN_ORIGINAL_LOGPROB to
0: log-probs are then those of the whole vocabulary at the temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name -> why any value but null and false is refused.
_LIMITS = {
    "preferred_sampling_params": "a grammar or a bias in it changes what is drawn and not the log-probs; expected no such key",
    "speculative_algorithm": "its thresholds accept drafted tokens that the log-probs do not account for; expected no such key",
    "enable_watermark": "log-probs are those before the watermark, which moves what is drawn; expected false",
    "disaggregation_mode": "the first token's most likely ones stay in another server, or are cut at 128; expected null",
}


def check_top_token_limits(options: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first of the extra server arguments that score centering cannot stand."""
    for name, value in options.items():
        why = _LIMITS.get(name.replace("-", "_"))
        if why is not None and str(value).lower() not in ("none", "null", "false"):
            raise ValueError(f"sglang.{name} = {value!r}: {why}")
