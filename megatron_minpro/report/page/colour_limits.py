"""Where a token's colour is strongest: one value for a whole run, so that responses can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

_SHARE = 0.99  # of the tokens that lie inside the limits
_FACTORS = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0, 1e3, 1e4)  # ratios that people know


def colour_limits(responses: Sequence[tuple[Mapping[str, np.ndarray], float]]) -> dict[str, float]:
    """Quantity -> its limit: nats for ratios, the quantity's own unit for the others.

    Args:
        responses: the streams of each response, [R], and its advantage.
    """

    def all_of(name: str) -> np.ndarray:
        return np.concatenate([streams[name] for streams, _ in responses]).astype(np.float64)

    behaviour = all_of("behaviour_logprobs")
    weights = all_of("weights")
    pulls = np.concatenate([streams["weights"] * advantage for streams, advantage in responses])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weights = np.log(np.abs(weights))
    return {
        "ratio": nice_factor(all_of("logprobs") - behaviour),
        "prefix_min": nice_factor(all_of("prefix_min")),
        "weight": nice_factor(log_weights),
        "pull": nice_number(pulls),
        "mismatch": nice_number(behaviour - all_of("engine_logprobs")),
        "entropy": nice_number(all_of("entropy")),
    }


def nice_factor(logs: np.ndarray) -> float:
    """The log of the smallest known factor that most |logs| stay below."""
    typical = _typical(logs)
    return math.log(next((factor for factor in _FACTORS if math.log(factor) >= typical), _FACTORS[-1]))


def nice_number(values: np.ndarray) -> float:
    """The smallest 1, 2 or 5 times a power of ten that most |values| stay below; 1 where all are 0."""
    typical = _typical(values)
    if typical == 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(typical))
    return float(f"{next(step for step in (1.0, 2.0, 5.0, 10.0) if step * power >= typical) * power:.3g}")


def _typical(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(np.quantile(finite, _SHARE)) if len(finite) else 0.0
