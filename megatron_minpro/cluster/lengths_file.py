"""`minpro plan --lengths FILE`: lengths of a run's own responses."""

from __future__ import annotations

from pathlib import Path

from megatron_minpro.tracking.json_lines import read_json_lines
from parallel.planner.lengths import Lengths, exponential, observed

_OF_A_RESPONSE = "num_response_tokens"  # in rollouts/*.jsonl
_OF_A_STEP = "rollout/length"  # in metrics.jsonl: a mean


def read_lengths(path: Path, *, longest: int) -> Lengths:
    """Lengths of responses.

    Args:
        path: a file of a run's rollouts folder, that folder, or a run's metrics.jsonl. The last tells a mean only: then the lengths are
            exponential.
        longest: no response is longer: rollout.max_new_tokens of the run that is planned. Longer ones are cut.

    Raises:
        ValueError: the path does not exist or tells no length.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise ValueError(f"--lengths: {path}: expected a run's rollouts/*.jsonl, the folder of these, or its metrics.jsonl")
    lines = [line for file in files for _, line in read_json_lines(file)]
    responses = [float(line[_OF_A_RESPONSE]) for line in lines if isinstance(line.get(_OF_A_RESPONSE), int)]
    if responses:
        return observed([min(length, longest) for length in responses], f"{len(responses):,} responses of {path}")
    means = [float(line[_OF_A_STEP]) for line in lines if isinstance(line.get(_OF_A_STEP), int | float)]
    if not means:
        raise ValueError(f"--lengths: {path}: no line has {_OF_A_RESPONSE} (a response) or {_OF_A_STEP} (a global step)")
    return exponential(min(sum(means) / len(means), longest), longest)
