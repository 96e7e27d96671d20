"""Measures as text: their names, and their numbers with as many digits as they deserve."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_minpro.report.measures import LABELS
from megatron_minpro.report.statistics import Interval

_BLOCKS = (  # measures beside each other in a table
    ("reward_first", "reward_last", "reward_best"),
    ("entropy_last", "sample_size", "clipped", "lag"),
    ("seconds", "step_s", "tokens_per_s"),
)
_HELD_OUT = ("before", "after", "best")
_FORMATS = {"clipped": ".2%", "lag": ".1f", "seconds": ",.0f", "step_s": ".2f", "tokens_per_s": ",.0f"}
_FORMAT = ".3f"


def shown_blocks(measures: Sequence[str]) -> list[list[str]]:
    """Measures beside each other in a table: those that some run has, and of held-out pass@k the smallest and the largest k."""
    ks = sorted({int(name.split("_")[2]) for name in measures if name.startswith("pass_at_")})
    held_out = [tuple(f"pass_at_{k}_{moment}" for moment in _HELD_OUT) for k in dict.fromkeys([*ks[:1], *ks[-1:]])]
    found = [[name for name in block if name in measures] for block in (_BLOCKS[0], *held_out, *_BLOCKS[1:])]
    return [block for block in found if block]


def label_of(measure: str) -> str:
    """reward_last -> reward, last; pass_at_8_after -> pass@8, after."""
    if measure in LABELS:
        return LABELS[measure]
    *name, moment = measure.split("_")
    return f"{'_'.join(name).replace('pass_at_', 'pass@')}, {moment}"


def number_text(value: float | None, measure: str, *, sign: str = "") -> str:
    """A dash for None. sign: + writes it in front of positive numbers too."""
    return "-" if value is None else format(value, sign + _FORMATS.get(measure, _FORMAT))


def mean_text(interval: Interval | None, measure: str) -> str:
    """Mean ± half of the interval."""
    if interval is None or interval.high is None:
        return number_text(None if interval is None else interval.mean, measure)
    return f"{number_text(interval.mean, measure)} ± {number_text(interval.high - interval.mean, measure)}"


def bounds_text(interval: Interval, measure: str) -> str:
    """Lower to upper end of a difference's interval."""
    if interval.low is None or interval.high is None:
        return "-"
    return f"{number_text(interval.low, measure, sign='+')} to {number_text(interval.high, measure, sign='+')}"
