"""report.md: what a study's rows say, as tables that read well as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.evaluation.tables import markdown_table
from megatron_minpro.scaling.routing import RoutingCost
from megatron_minpro.scaling.rows import Row, waiting_share

_HEADER = ("scaling", "ranks", "ep", "dp", "sequences", "step s (min to max)", "tokens/s/rank", "efficiency", "TFLOP/s/rank", "MFU", "GB")
_LOAD = ("waits %", "bubble %", "expert load max / mean", "rank imbalance")


def series(rows: Sequence[Row], kind: str, scaling: str) -> list[Row]:
    """One curve: what ran, or would fit, of a kind and scaling, fewest ranks first."""
    chosen = [row for row in rows if row.kind == kind and scaling in row.scalings.split() and row.status == "ok"]
    return sorted(chosen, key=lambda row: (row.world_size, row.ep))


def efficiency(rows: Sequence[Row], row: Row, scaling: str) -> float | None:
    """Throughput per rank over that of the smallest layout of the same series; None for a row that is not in it."""
    curve = series(rows, row.kind, scaling)
    if row not in curve:
        return None
    assert row.tokens_per_s_per_gpu is not None and curve[0].tokens_per_s_per_gpu is not None
    return row.tokens_per_s_per_gpu / curve[0].tokens_per_s_per_gpu


def memory_of(row: Row) -> float | None:
    """GB to compare with a prediction: CUDA's tensors; on a CPU what the process gained since before the model was built."""
    if row.kind == "predicted":
        return row.predicted_total_gb
    if row.peak_allocated_gb is not None:
        return row.peak_allocated_gb
    if row.peak_rss_gb is None or row.rss_before_gb is None:
        return None
    return row.peak_rss_gb - row.rss_before_gb


def write_report(folder: Path, rows: Sequence[Row], routing: Sequence[RoutingCost], *, routing_source: str | None) -> str:
    """Write report.md; returns its text."""
    first = rows[0]
    parts = [f"# {first.model} ({first.parameters / 1e9:.3g}B parameters): scaling of expert parallelism\n"]
    length = (
        f"{first.sequence_length:,.0f} tokens a sequence, {first.precision}, recompute {first.recompute}, dispatcher {first.dispatcher}"
    )
    parts.append(f"{length}; {'forced-balanced' if first.routing == 'forced' else 'real'} routing; hardware {first.hardware}.\n")
    for kind in ("measured", "predicted"):
        mine = [row for row in rows if row.kind == kind]
        if mine:
            parts += [f"## {kind}\n", _origin(mine), _table(rows, mine, with_load=kind == "measured"), _problems(mine)]
    compared = _comparison(rows)
    if compared:
        parts += ["## predicted against measured\n", compared]
    if routing:
        parts += ["## routing imbalance\n", _routing(routing, routing_source)]
    text = "\n".join(part for part in parts if part)
    write_atomically(folder / "report.md", text)
    return text


def _origin(rows: Sequence[Row]) -> str:
    ran = next((row for row in rows if row.device is not None), None)
    if ran is None:
        return ""
    memory = (
        "GB: peak of CUDA's tensors"
        if ran.peak_allocated_gb is not None
        else "GB: peak resident memory of a process, of which the libraries took "
        f"{ran.rss_before_gb:.2f} GB before the model was built; a CPU counts nothing finer"
    )
    waits = "" if ran.exposed_s or ran.peak_allocated_gb is None else "; waiting inside communication is not measured on CUDA"
    versions = f"torch {ran.torch_version}, megatron-core {ran.megatron_core_version}"
    crowded = [row.world_size for row in rows if ran.peak_allocated_gb is None and row.cores is not None and row.world_size > row.cores]
    shared = f" {min(crowded)} and more ranks share {ran.cores} cores: their rows say nothing about scaling." if crowded else ""
    drawn = "; random weights, so their routing is not a trained model's" if any(row.weights == "random" for row in rows) else ""
    return f"{ran.device}, {versions}{drawn}. Median of {ran.steps} steps, of each the slowest rank. {memory}{waits}.{shared}\n"


def _table(rows: Sequence[Row], mine: Sequence[Row], *, with_load: bool) -> str:
    lines = []
    for row in mine:
        for scaling in row.scalings.split():
            if row.step_s is None:
                continue
            spread = "" if row.step_s_min is None or row.step_s_max is None else f" ({row.step_s_min:.3g} to {row.step_s_max:.3g})"
            whole = row.predicted_total_gb if row.kind == "predicted" else row.peak_allocated_gb or row.peak_rss_gb
            line = [scaling, str(row.world_size), str(row.ep), _text(row.dp), str(row.sequences), f"{row.step_s:.4g}{spread}"]
            line += [_number(row.tokens_per_s_per_gpu, ",.0f"), _number(efficiency(rows, row, scaling), ".0%")]
            line += [_number(row.tflops_per_gpu, ".3g"), _number(row.mfu, ".1%"), _number(whole, ".3g")]
            if with_load:
                load = None if row.expert_load_max is None else f"{row.expert_load_max:.0f} / {row.expert_load_mean:.0f}"
                line += [_number(waiting_share(row), ".0%"), _number(row.bubble, ".0%"), load or "-", _number(row.rank_imbalance, ".3f")]
            lines.append(line)
    if not lines:
        return ""
    return markdown_table([*_HEADER, *(_LOAD if with_load else ())], lines)


def _problems(rows: Sequence[Row]) -> str:
    lines = [f"- ranks {row.world_size}, ep {row.ep}: {row.status.replace('_', ' ')}: {row.reason}" for row in rows if row.reason]
    return "\n".join(lines) + "\n" if lines else ""


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Predicted and measured row of every case that has both times."""
    of_kind: Mapping[str, dict[str, Row]] = {
        kind: {row.key: row for row in rows if row.kind == kind and row.step_s is not None} for kind in ("predicted", "measured")
    }
    return [(of_kind["predicted"][key], row) for key, row in of_kind["measured"].items() if key in of_kind["predicted"]]


def _comparison(rows: Sequence[Row]) -> str:
    lines, errors = [], []
    for plan, row in pairs(rows):
        assert plan.step_s is not None and row.step_s is not None
        errors.append(plan.step_s / row.step_s - 1)
        memory, expected = memory_of(row), memory_of(plan)
        line = [str(row.world_size), str(row.ep), str(row.sequences), f"{plan.step_s:.4g}", f"{row.step_s:.4g}", f"{errors[-1]:+.0%}"]
        lines.append([*line, _number(expected, ".3g"), _number(memory, ".3g")])
    if not lines:
        return ""
    header = ["ranks", "ep", "sequences", "predicted s", "measured s", "error", "predicted GB", "measured GB"]
    above = " Measured GB: above what the libraries took." if all(row.peak_allocated_gb is None for _, row in pairs(rows)) else ""
    mean = sum(map(abs, errors)) / len(errors)
    return markdown_table(header, lines) + f"\nMean absolute error of the step time: {mean:.0%}.{above}\n"


def _routing(costs: Sequence[RoutingCost], source: str | None) -> str:
    header = ["ranks", "ep", "sequences", "tokens in a dispatch", "rank imbalance", "balanced s", "with it s", "slower by"]
    lines = []
    for cost in costs:
        line = [str(cost.world_size), str(cost.ep), str(cost.sequences), f"{cost.dispatch_tokens:,}", f"{cost.rank_imbalance:.3f}"]
        lines.append([*line, f"{cost.balanced_s:.4g}", f"{cost.step_s:.4g}", f"{cost.slowdown - 1:.1%}"])
    return f"Expert choices measured on {source}; step times are the planner's.\n\n{markdown_table(header, lines)}"


def _number(value: float | None, layout: str) -> str:
    return "-" if value is None else format(value, layout)


def _text(value: object) -> str:
    return "-" if value is None else str(value)
