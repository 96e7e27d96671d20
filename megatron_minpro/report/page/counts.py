"""What became of a run's responses and servers: counts for the Run tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Metrics = Sequence[Mapping[str, float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """One number with its name; None where nothing says it."""

    label: str
    value: int | None
    meaning: str


def counts(metrics: Metrics, result: Mapping[str, Any] | None) -> list[Count]:
    """Of the whole run, earlier attempts included, as far as the files say.

    Args:
        metrics: lines of metrics.jsonl.
        result: result.json, None before the run's end.
    """
    return [
        Count(label="sampled", value=_of(result, "rollouts_sampled", _last(metrics, "total/rollouts_sampled")), meaning="responses"),
        Count(label="trained", value=_of(result, "rollouts_trained", _last(metrics, "total/rollouts_trained")), meaning="responses"),
        Count(
            label="dropped",
            value=_of(result, "rollouts_dropped", _last(metrics, "total/rollouts_dropped")),
            meaning="responses, by dynamic sampling",
        ),
        Count(label="lost", value=_of(result, "rollouts_lost", None), meaning="responses, sampled again after an interruption"),
        Count(label="not graded", value=_sum(metrics, "reward/errors"), meaning="responses whose grading failed; they count as wrong"),
        Count(label="retried", value=_sum(metrics, "servers/retries"), meaning="responses, asked for again after a failure"),
        Count(label="restarted", value=_sum(metrics, "servers/restarts"), meaning="servers"),
    ]


def _of(result: Mapping[str, Any] | None, name: str, otherwise: int | None) -> int | None:
    value = (result or {}).get(name)
    return value if isinstance(value, int) else otherwise


def _last(metrics: Metrics, name: str) -> int | None:
    return next((int(value) for line in reversed(metrics) if (value := line.get(name)) is not None), None)


def _sum(metrics: Metrics, name: str) -> int | None:
    values = [value for line in metrics if (value := line.get(name)) is not None]
    return int(sum(values)) if values else None
