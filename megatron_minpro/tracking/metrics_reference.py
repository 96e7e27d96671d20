"""Writes README.md beside this file from the metrics table: python -m megatron_minpro.tracking.metrics_reference"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.tracking.metrics_table import METRICS, Combined, Metric

PAGE = Path(__file__).parent / "README.md"

_INTRODUCTION = """\
# What a run writes down

This page is made from `metrics_table.py`; change that file, then run `python -m megatron_minpro.tracking.metrics_reference`.

| file in the run folder | content | written by |
|---|---|---|
| `metrics.jsonl` | one line per global step, all metrics below; `null` where a number is not finite | `metrics_file.py`, always |
| `tensorboard/` | the same numbers, histograms of both logarithms, three responses a step | `tensorboard.py`, the default tracker |
| `wandb/` | the same as a wandb run, online or offline | `wandb.py`, with `tracking.trackers=[{name: wandb}]` |
| `rollouts/step_000012.jsonl` | every response sampled in a step | `rollout_log.py`, unless `tracking.keep_rollouts=false` |
| `tokens/step_000012_update_0003.safetensors` | what the objective saw of a few responses | `token_records.py` |
| `versions.jsonl` | one line per attempt: versions of Python, packages, checkout and servers, names of CPU and GPU | `versions.py` |
| `progress.json` | what the run does now | `progress.py`; `console.py` shows it |

Lines that a full disk cannot take wait in memory (`late_files.py`) and are written before the next checkpoint is complete.

A tracker of your own is an object with three methods (`tracker.py`): `start(config)`, `log(step, metrics)`, `finish(summary)`.
It may have a fourth, `log_details(step, details)`: the histograms and a few responses of the batch that was trained (`step_details.py`).
`tracking.trackers=[tensorboard, {name: "my_package.my_module:MyTracker", my_option: 3}]` calls `MyTracker(run_dir, my_option=3)`.

## Metrics

Global steps count from 0. Step k samples batch k and trains batch k - staleness. A step that does not sample, or does not train, lacks
the metrics of that half. `reward/trained` is the headline: the reward of the batch that is trained, as in the paper's figures.
`ratio/` and `prefix_min/` are ratios; `log_ratio/` and `log_prefix_min/` are natural logarithms of them.
A metric that is not in this table ends the run with an error. A plug-in may log names of its own under `custom/`: `custom/my_number`.
"""


def render() -> str:
    """The whole page, Markdown."""
    numbers = {combined: number for number, combined in enumerate(Combined, start=1)}
    parts = [_INTRODUCTION]
    for group, metrics in groupby(METRICS, key=lambda metric: metric.name.partition("/")[0]):
        parts.append(f"\n### {group}\n\n| name | unit | meaning | combined | from |\n|---|---|---|---|---|\n")
        parts += [_row(list(same), numbers) for _, same in groupby(metrics, key=lambda metric: metric.meaning)]
    parts.append("\n### How parts become one number\n\n")
    parts += [f"{number}. {combined.value}\n" for combined, number in numbers.items()]
    return "".join(parts)


def _row(metrics: Sequence[Metric], numbers: Mapping[Combined, int]) -> str:
    """Of metrics that mean the same: the first two of their names, and the last."""
    names = [f"`{metric.name}`" for metric in metrics]
    shown = " ".join(names if len(names) < 4 else [*names[:2], "...", names[-1]])
    one = metrics[0]
    meaning = one.meaning.replace("|", "\\|")
    return f"| {shown} | {one.unit} | {meaning} | {numbers[one.combined]} | `{one.source}` |\n"


if __name__ == "__main__":
    write_atomically(PAGE, render(), durable=False)
