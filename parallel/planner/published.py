"""The published rows as what the planner takes, and its prediction for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from parallel.layout import ParallelLayout
from parallel.planner.efficiency import DEFAULT, Efficiency
from parallel.planner.hardware import Hardware, read_hardware
from parallel.planner.memory import stage_memory
from parallel.planner.shape import ModelShape, from_config
from parallel.planner.stages import check_layout
from parallel.planner.step import step_time
from parallel.planner.training import Batch, Training
from parallel.shipped import shipped_folder

ROWS = Path(__file__).with_name("published_rows.yaml")


@dataclass(frozen=True)
class Row:
    """One published step. published_s: as printed, else from the printed TFLOP/s per GPU. peak_gb: None where not published."""

    id: str
    model: str
    use: str
    source: str
    shape: ModelShape
    layout: ParallelLayout
    hardware: Hardware
    training: Training
    batch: Batch
    published_s: float
    published_tflops: float
    peak_gb: float | None

    def predicted_s(self, efficiency: Efficiency = DEFAULT) -> float:
        return step_time(self.shape, self.layout, self.hardware, self.training, self.batch, efficiency=efficiency).step_s

    def predicted_gb(self) -> float:
        stages = [stage_memory(self.shape, self.layout, stage, self.training, self.batch) for stage in range(self.layout.pp)]
        return max(stage.total for stage in stages) / 1e9


@lru_cache
def shape_of(model: str) -> ModelShape:
    path = shipped_folder("models") / f"{model}.json"
    return from_config(json.loads(path.read_text()), name=model, source=path)


def read_rows() -> list[Row]:
    return [_row(values) for values in yaml.safe_load(ROWS.read_text())["rows"]]


def pipeline_of(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `parallel.stages.Pipeline` that a row names."""
    counted = values.get("ends_count", False)
    return {
        "pp": values.get("pp", 1),
        "vpp": values.get("vpp"),
        "count_embedding_as_layer": counted,
        "count_loss_as_layer": counted,
        "layers_per_stage": values.get("layers_per_stage"),
    }


def _row(values: dict[str, Any]) -> Row:
    shape = shape_of(values["model"])
    tp, cp, sequence = values.get("tp", 1), values.get("cp", 1), values.get("sequence", 4096)
    layout = ParallelLayout(
        world_size=values["gpus"],
        tp=tp,
        cp=cp,
        ep=values.get("ep", 1),
        sequence_parallel=tp > 1,
        **pipeline_of(values),
    )
    check_layout(shape, layout)
    training = Training(
        precision=values["precision"],
        spec="fused",
        on_cpu=False,
        recompute=values.get("recompute", "none"),
        dispatcher=values["dispatcher"],
        overlap=values["overlap"],
        cuda_graphs=values["cuda_graphs"],
        fp8_attention=values.get("fp8_attention", False),
        fsdp=values.get("fsdp", False),
        imbalance=values.get("imbalance", 1.0),
        gradient_bytes=2,
        chunk_tokens=None,
        release=values["release"],
    )
    batch = Batch(
        micro_batch_tokens=values["mbs"] * sequence,
        num_micro_batches=values["gbs"] // (layout.dp * values["mbs"]),
        sequence_length=sequence,
    )
    flops = values["gbs"] * sequence * shape.flops_per_token(sequence) / layout.world_size
    seconds = values["step_s"] if "step_s" in values else flops / (1e12 * values["tflops"])
    return Row(
        id=values["id"],
        model=values["model"],
        use=values["use"],
        source=values["source"],
        shape=shape,
        layout=layout,
        hardware=read_hardware(values["hardware"]),
        training=training,
        batch=batch,
        published_s=seconds,
        published_tflops=1e-12 * flops / seconds,
        peak_gb=values.get("peak_gb"),
    )
