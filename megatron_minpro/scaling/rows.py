"""One row of a study: a layout, predicted or measured. A field is None where it was not, or could not be, found out."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.scaling.study import Case, Settings
from parallel.capabilities import Capabilities
from parallel.planner.hardware import Hardware
from parallel.planner.memory import GB
from parallel.planner.plan import Plan, batch_of
from parallel.planner.shape import ModelShape
from parallel.planner.training import Training

Status = Literal["ok", "illegal", "does_not_fit", "out_of_memory", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Times in seconds of one optimizer step, memory in GB of 1e9 bytes on the fullest rank, tokens with their padding left out."""

    key: str
    kind: Literal["predicted", "measured"]
    status: Status
    reason: str | None = None
    scalings: str
    # what was run
    model: str
    parameters: int
    hardware: str
    device: str | None = None
    cores: int | None = None  # of each machine
    precision: str
    routing: str
    weights: str | None = None  # measured with: "checkpoint", or "random" where model.path was yet to be made
    imbalance_assumed: float | None = None
    dispatcher: str
    overlap: bool
    recompute: str
    world_size: int
    ep: int
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    etp: int | None = None
    dp: int | None = None
    edp: int | None = None
    sequences: int
    sequence_length: float
    micro_batches: int | None = None
    torch_version: str | None = None
    megatron_core_version: str | None = None
    transformer_engine_version: str | None = None
    # how fast
    step_s: float | None = None  # median of the window; of each step the slowest rank counts
    step_s_min: float | None = None
    step_s_max: float | None = None
    steps: int | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    # how full
    peak_allocated_gb: float | None = None  # CUDA's tensors
    peak_reserved_gb: float | None = None  # CUDA's allocator
    peak_rss_gb: float | None = None  # the whole process, libraries included: on a CPU nothing finer is counted
    rss_before_gb: float | None = None  # of it, before the model was built
    predicted_total_gb: float | None = None
    memory_gb: Mapping[str, float] = field(default_factory=dict)
    # where the time goes
    time_s: Mapping[str, float] = field(default_factory=dict)
    exposed_s: Mapping[str, float] = field(default_factory=dict)  # communication that computation waits for, by kind; mean over ranks
    explained_s: float | None = None  # the step in which that was watched; watching costs time
    bubble: float | None = None  # share of a step in which a rank waits for other stages
    expert_load_max: float | None = None  # tokens of one expert, micro-batch and layer
    expert_load_mean: float | None = None
    rank_imbalance: float | None = None  # busiest expert-parallel rank over the mean


def waiting_share(row: Row) -> float | None:
    """Part of a step that a rank spends waiting in communication; None where that was not measured."""
    if row.world_size == 1:
        return 0.0
    return None if row.explained_s is None else sum(row.exposed_s.values()) / row.explained_s


def describe(case: Case, shape: ModelShape, training: Training, settings: Settings, *, kind: Literal["predicted", "measured"]) -> Row:
    """The row before anything is known about it: illegal, or failed without a reason."""
    layout = case.layout
    places = {axis: getattr(layout, axis) for axis in ("tp", "pp", "vpp", "cp", "etp", "dp", "edp")} if layout is not None else {}
    return Row(
        key=case.key,
        kind=kind,
        status="failed" if case.problem is None else "illegal",
        reason=case.problem,
        scalings=" ".join(case.scalings),
        model=shape.name,
        parameters=shape.total_parameters,
        hardware=settings.hardware,
        precision=training.precision,
        routing=settings.routing,
        imbalance_assumed=training.imbalance if kind == "predicted" else None,
        dispatcher=training.dispatcher,
        overlap=training.overlap,
        recompute=training.recompute,
        world_size=case.world_size,
        ep=case.ep,
        **places,
        sequences=case.sequences,
        sequence_length=settings.mean_tokens,
    )


def predicted(row: Row, plan: Plan) -> Row:
    """Fill a described row from its plan."""
    time = plan.time
    missing = f"{plan.missing_bytes / GB:.1f} GB too much, largest part {plan.fullest.largest}"
    return replace(
        row,
        status="ok" if plan.fits else "does_not_fit",
        reason=None if plan.fits else missing,
        micro_batches=batch_of(plan.work, plan.layout).num_micro_batches,
        step_s=time.step_s,
        tokens_per_s_per_gpu=time.tokens_per_s_per_gpu,
        tflops_per_gpu=time.tflops_per_gpu,
        mfu=time.mfu,
        predicted_total_gb=plan.fullest.total / GB,
        memory_gb={name: value / GB for name, value in plan.fullest.parts().items()},
        time_s=dict(time.parts),
        bubble=time.parts["pipeline bubble"] / time.step_s,
    )


def measured(row: Row, found: Mapping[str, Any], shape: ModelShape, hardware: Hardware, capabilities: Capabilities) -> Row:
    """Fill a described row from what its ranks found: step_s of every step, and fields of Row under their own names."""
    seconds: Sequence[float] = found["step_s"]
    step = statistics.median(seconds)
    tokens = row.sequences * row.sequence_length
    flops = tokens * shape.flops_per_token(row.sequence_length) / step / row.world_size
    others = {name: value for name, value in found.items() if name != "step_s"}
    return replace(
        row,
        status="ok",
        device=capabilities.device_name,
        torch_version=capabilities.torch_version,
        megatron_core_version=capabilities.megatron_core_version,
        transformer_engine_version=capabilities.transformer_engine_version,
        step_s=step,
        step_s_min=min(seconds),
        step_s_max=max(seconds),
        steps=len(seconds),
        tokens_per_s_per_gpu=tokens / step / row.world_size,
        tflops_per_gpu=1e-12 * flops,
        mfu=flops / hardware.peak_flops(row.precision),
        **others,
    )


def write_row(folder: Path, row: Row) -> None:
    """One file a row: array tasks write beside each other."""
    write_atomically(folder / "rows" / f"{row.kind}_{row.key}.json", json.dumps(asdict(row), indent=2) + "\n")


def read_row(folder: Path, kind: str, key: str) -> Row | None:
    """The row, or None before there is one."""
    path = folder / "rows" / f"{kind}_{key}.json"
    return Row(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def rows_of(folder: Path, cases: Sequence[Case]) -> list[Row]:
    """The rows that there are of these cases, predicted ones first. Which series a case belongs to depends on the others beside it."""
    found = [(read_row(folder, kind, case.key), case) for kind in ("predicted", "measured") for case in cases]
    return [replace(row, scalings=" ".join(case.scalings)) for row, case in found if row is not None]


def write_tables(folder: Path, rows: Iterable[Row]) -> None:
    """rows.jsonl and rows.csv, the same rows; in the CSV a part of memory, time or waiting has a column of its own."""
    records = [asdict(row) for row in rows]
    write_atomically(folder / "rows.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    flat = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for record in flat for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_atomically(folder / "rows.csv", text.getvalue())


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{part}": number for part, number in value.items()}
        else:
            flat[name] = value
    return flat
