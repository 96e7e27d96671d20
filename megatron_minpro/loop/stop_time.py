"""How long a stop takes: the longest piece of work between two looks for one, and a checkpoint. Measured by each global step."""

from __future__ import annotations

import math
from collections.abc import Mapping

LONGEST_UPDATE, CHECKPOINT = "time/longest_update", "time/checkpoint"
# Nobody looks for a stop inside of these.
_PIECES = {LONGEST_UPDATE: "an update", "time/score": "the scoring of a batch", "time/sync": "a weight sync"}


def stop_warning(metrics: Mapping[str, float | None], *, allowed_s: float | None) -> str | None:
    """What to say of a global step that shows that a stop may take too long; None when all is well, or as far as is known.

    Args:
        metrics: of one global step.
        allowed_s: checkpoint.stop_within_s.
    """
    if allowed_s is None:
        return None
    pieces = {what: metrics.get(name) or 0.0 for name, what in _PIECES.items()}
    longest = max(pieces, key=lambda what: pieces[what])
    checkpoint_s = metrics.get(CHECKPOINT) or 0.0
    needed_s = pieces[longest] + checkpoint_s
    if needed_s <= allowed_s:
        return None
    return (
        f"a stop takes up to {math.ceil(needed_s)} s ({longest} {pieces[longest]:.1f} s, a checkpoint {checkpoint_s:.1f} s), "
        f"checkpoint.stop_within_s allows {allowed_s:g}: raise it (in slurm/: STOP_WITHIN, and the time of --signal above it)"
    )
