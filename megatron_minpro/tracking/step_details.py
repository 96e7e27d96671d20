"""What a step has besides numbers, for trackers that can show it: histograms and a few responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of tokens, over all ranks and updates of a step."""

    edges: Sequence[float]  # ascending; bin i holds edges[i - 1] < x <= edges[i]
    counts: Sequence[float]  # one more than edges: the first and the last bin are open


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDetails:
    """Of the batch that a step has trained."""

    # log_ratio, log_prefix_min, and of each share of the responses log_ratio_histogram/share_0_1, ...; empty where no token is
    histograms: Mapping[str, Histogram]
    responses: Sequence[Mapping[str, Any]]  # lines of rollouts/step_....jsonl, each of another prompt; none where no file is kept
