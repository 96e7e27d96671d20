"""The clip that never clips: the sign of a run that compares the policy with itself instead of with the policy that sampled.

Nothing else shows it. Log-probs computed anew under the newest weights, weights that no update moves, a gradient that is 0: losses and
rewards look alive, while every ratio is 1 and the objective under study never acts.
"""

from __future__ import annotations

from collections.abc import Mapping


def idle_clip(metrics: Mapping[str, float | None]) -> str | None:
    """What to say of a global step whose trained tokens all have ratio 1 although the policy had been updated since they were sampled.

    metrics: of one global step, names as in metrics.jsonl. None when all is well.
    """
    lag = metrics.get("batch/lag_max")
    if metrics.get("ratio/unit") != 1.0 or not lag:
        return None
    return (
        f"every ratio is 1 although the policy was up to {lag:.0f} updates ahead of the one that sampled: the clip never acts. Check that "
        "behaviour log-probs are kept from the sampling weights and not computed anew, that update/grad_norm is not 0, and that the "
        "learning rate is large enough to move weights of model.dtype"
    )
