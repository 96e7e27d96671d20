"""Numbers as the page holds them."""

from __future__ import annotations

import math

_DIGITS = 6


def rounded(value: float | None) -> float | None:
    """Six significant digits; a whole number stays one; None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
