"""A row's numbers against a calculator, and the same row out of every file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from megatron_minpro.scaling.measure_rank import failure, summarize
from megatron_minpro.scaling.rows import Row, describe, measured, read_row, rows_of, waiting_share, write_row, write_tables
from megatron_minpro.scaling.study import Case, Settings
from megatron_minpro.scaling.tables import efficiency, series, write_report
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.planner.hardware import hardware_of_device, read_hardware
from parallel.planner.models import FOLDER, read_shape
from parallel.planner.training import Training

SHAPE = read_shape(FOLDER / "qwen3_30b_a3b.json")
SETTINGS = Settings(routing="forced", mean_tokens=4096, warm_up=1, steps=3, hardware="h100", imbalance=1.0)
TRAINING = Training(
    precision="bf16", spec="fused", on_cpu=False, recompute="none", dispatcher="alltoall", overlap=False, cuda_graphs="none",
    fp8_attention=False,
    fsdp=False, imbalance=1.0, gradient_bytes=4, chunk_tokens=1024, release=26.06,
)  # fmt: skip


def case(world_size: int, ep: int, sequences: int, *scalings: str, problem: str | None = None) -> Case:
    layout = None if problem else ParallelLayout(world_size=world_size, ep=ep)
    return Case(ep=ep, world_size=world_size, sequences=sequences, scalings=scalings, layout=layout, problem=problem)


def row(what: Case, seconds: list[float], **found: object) -> Row:
    described = describe(what, SHAPE, TRAINING, SETTINGS, kind="measured")
    return measured(described, {"step_s": seconds, **found}, SHAPE, read_hardware("h100"), detect())


def test_rates_follow_from_the_median_step() -> None:
    """The published pair of findings: 1,024 sequences of 4,096 tokens in 20.147 s on 16 H100 are 299.35 TFLOP/s/GPU."""
    found = row(case(16, 16, 1024, "strong"), [20.0, 20.147, 90.0])
    assert (found.step_s, found.step_s_min, found.step_s_max, found.steps) == (20.147, 20.0, 90.0, 3)
    assert found.tokens_per_s_per_gpu == pytest.approx(1024 * 4096 / 20.147 / 16)
    assert found.tflops_per_gpu == pytest.approx(299.352, rel=1e-3)
    assert found.mfu == pytest.approx(299.352 / 989, rel=1e-3)
    assert (found.status, found.routing, found.dp) == ("ok", "forced", 16)
    assert found.peak_rss_gb is None and found.bubble is None  # not found out, so not made up


def test_of_each_step_the_slowest_rank_counts_and_of_memory_the_fullest() -> None:
    memory = {"peak_rss_gb": 1.0, "peak_allocated_gb": None}
    everybody = [
        {"seconds": [1.0, 4.0], "memory": memory, "waiting": {"pipeline": 0.5, "dispatch": 1.0}, "explained_s": 2.0, "routed": []},
        {"seconds": [3.0, 2.0], "memory": {**memory, "peak_rss_gb": 2.0}, "waiting": {"pipeline": 1.5}, "explained_s": 2.0, "routed": []},
    ]
    found = summarize(everybody, ParallelLayout(world_size=2, pp=2), micro_batches=4)
    assert found["step_s"] == [3.0, 4.0]
    assert (found["peak_rss_gb"], found["peak_allocated_gb"]) == (2.0, None)
    assert found["exposed_s"] == {"dispatch": 0.5, "pipeline": 1.0}
    assert found["bubble"] == 0.5
    without = [{**each, "waiting": None, "explained_s": None} for each in everybody]
    assert "bubble" not in summarize(without, ParallelLayout(world_size=2, pp=2), micro_batches=4)
    assert summarize(without, ParallelLayout(world_size=2), micro_batches=4)["bubble"] == 0.0


def test_running_out_of_memory_is_told_from_other_failures() -> None:
    assert failure(MemoryError("no"), rank=3) == {"status": "out_of_memory", "reason": "rank 3: MemoryError: no"}
    assert failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), rank=0)["status"] == "out_of_memory"
    assert failure(RuntimeError("two\nlines"), rank=1) == {"status": "failed", "reason": "rank 1: RuntimeError: two lines"}


def test_efficiency_is_throughput_per_rank_over_the_smallest_layouts(tmp_path: Path) -> None:
    illegal = describe(case(8, 3, 16, "strong", problem="ep=3 does not divide"), SHAPE, TRAINING, SETTINGS, kind="measured")
    measurements = ((case(4, 4, 16, "strong"), 1.0), (case(2, 2, 16, "strong", "weak"), 1.0), (case(4, 4, 32, "weak"), 1.25))
    rows = [*(row(what, [seconds], peak_rss_gb=1.0, rss_before_gb=0.5) for what, seconds in measurements), illegal]
    assert [each.world_size for each in series(rows, "measured", "strong")] == [2, 4]
    assert efficiency(rows, rows[1], "weak") == 1.0
    assert efficiency(rows, rows[0], "strong") == pytest.approx(0.5)  # same step on twice the ranks
    assert efficiency(rows, rows[2], "weak") == pytest.approx(0.8)
    assert efficiency(rows, illegal, "strong") is None
    text = write_report(tmp_path, rows, [], routing_source=None)
    assert "- ranks 8, ep 3: illegal: ep=3 does not divide" in text
    assert "| weak    | 4 " in text and "80%" in text
    assert "of which the libraries took 0.50 GB" in text  # nobody takes it for the model's memory


def test_what_nobody_watched_is_no_number() -> None:
    found = row(case(2, 2, 16, "weak"), [2.0])
    assert waiting_share(found) is None
    assert waiting_share(row(case(2, 2, 16, "weak"), [2.0], exposed_s={"dispatch": 0.3, "tensor parallelism": 0.1}, explained_s=4.0)) == 0.1
    assert waiting_share(row(case(1, 1, 16, "weak"), [2.0])) == 0.0  # one rank has nobody to wait for


def test_rows_survive_their_files(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    cases = [case(2, 2, 16, "strong"), case(4, 4, 16, "strong"), case(8, 8, 16, "strong")]
    second, first = row(cases[0], [1.0]), row(cases[1], [1.0], exposed_s={"dispatch": 0.25})
    for each in (first, second):
        write_row(tmp_path, each)
    assert read_row(tmp_path, "measured", first.key) == first
    assert read_row(tmp_path, "predicted", first.key) is None
    assert rows_of(tmp_path, cases) == [second, first]
    [again] = rows_of(tmp_path, [case(2, 2, 16, "strong", "weak")])  # in a shorter list both series begin with it
    assert again.scalings == "strong weak"
    write_tables(tmp_path, [second, first])
    assert [Row(**json.loads(line)) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [second, first]
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["exposed_s.dispatch"] for line in lines] == ["", "0.25"]
    assert [line["ep"] for line in lines] == ["2", "4"]


def test_a_device_names_its_hardware() -> None:
    assert hardware_of_device("NVIDIA H200") == "h200"
    assert hardware_of_device("NVIDIA GB200") == "gb200"
    assert hardware_of_device("CPU") == "cpu"
    with pytest.raises(ValueError, match="'Tesla T4' is none of"):
        hardware_of_device("Tesla T4")
