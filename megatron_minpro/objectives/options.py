"""Checks of objective options. All raise ValueError naming the option, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_number(name: str, value: object, *, at_least: float | None = None, above: float | None = None) -> float:
    """A finite number (not a bool, not text) within the given bounds, as float.

    Args:
        name: of the option, for the error.
        value: what the user gave.
        at_least: lower bound that is allowed itself.
        above: lower bound that is not.

    Raises:
        ValueError: naming the option, its value and what was expected.
    """
    bound = f" of at least {at_least}" if at_least is not None else f" above {above}" if above is not None else ""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    if (at_least is not None and value < at_least) or (above is not None and value <= above):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of the given words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Logarithms of the ratio bounds [1 - clip_low, 1 + clip_high]; a lower bound of 0 or less never acts: -inf."""
    check_number("clip_low", clip_low, at_least=0)
    check_number("clip_high", clip_high, at_least=0)
    return (math.log1p(-clip_low) if clip_low < 1 else -math.inf), math.log1p(clip_high)
