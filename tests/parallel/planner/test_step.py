"""Pieces of a step's time against numbers worked by hand and against measured tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from parallel.layout import ParallelLayout
from parallel.planner.communication import dispatch_seconds
from parallel.planner.compute import Machine
from parallel.planner.efficiency import DEFAULT
from parallel.planner.hardware import FOLDER, from_values, known_hardware, read_hardware
from parallel.planner.memory import micro_batches_in_flight
from parallel.planner.published import Row, read_rows
from parallel.planner.step import step_time

ROWS = {row.id: row for row in read_rows()}
HYBRID = ROWS["30b-h100-bf16-hybridep"]


def machine(**efficiency: float) -> Machine:
    return Machine(hardware=read_hardware("h100"), efficiency=replace(DEFAULT, **efficiency), precision="bf16")


@pytest.mark.parametrize(("dispatcher", "expected_s"), [("alltoall", 16.5), ("hybridep", 4.1)])
def test_dispatch_over_two_nodes_takes_what_the_copies_per_token_say(dispatcher: str, expected_s: float) -> None:
    # 4.0 copies leave the node with alltoall, 0.997 deduplicated; 4 passes, 48 layers, 64 micro-batches at 50 GB/s.
    training = replace(HYBRID.training, dispatcher=dispatcher)
    ideal = machine(network=1.0, nvlink_dispatch=1.0)
    ideal = replace(ideal, hardware=replace(ideal.hardware, network_latency_us=0.0))
    once = dispatch_seconds(HYBRID.shape, HYBRID.layout, ideal, HYBRID.batch, training)
    assert 4 * 48 * 64 * once == pytest.approx(expected_s, rel=0.03)


@pytest.mark.parametrize(("rows", "tflops"), [(32, 79), (64, 142), (128, 238), (256, 362), (512, 422), (1024, 460)])
def test_experts_with_few_rows_follow_the_measured_curve(rows: int, tflops: float) -> None:
    # Fused experts of 2,048 x 768, 128 of them, on H100; one constant, 540 of 989 TFLOP/s for large ones.
    fused = machine(grouped_gemm=540 / 989)
    seconds = fused.product(rows, 2 * 768, 2048, count=128, grouped=True) + fused.product(rows, 2048, 768, count=128, grouped=True)
    assert 1e-12 * 2 * rows * 128 * 3 * 2048 * 768 / seconds == pytest.approx(tflops, rel=0.20)


@pytest.mark.parametrize(("m", "k", "n"), [(4096, 2048, 5120), (8192, 5120, 5120)])
def test_large_products_reach_what_public_tables_measure(m: int, k: int, n: int) -> None:
    # 660 to 830 TFLOP/s between these sizes, with the achievable maximum of 794 of 989.
    assert 1e-12 * 2 * m * k * n / machine(gemm=0.803).product(m, n, k) == pytest.approx(745, rel=0.13)


def test_parts_add_up_and_the_bubble_is_that_of_the_interleaved_schedule() -> None:
    row = ROWS["235b-h100-bf16-deepep"]
    time = step_time(row.shape, row.layout, row.hardware, row.training, row.batch)
    assert sum(time.parts.values()) == pytest.approx(time.step_s)
    once_a_step = ("pipeline bubble", "gradients and parameters", "optimizer")
    pipeline = sum(seconds for name, seconds in time.parts.items() if name not in once_a_step)
    p, v, m = row.layout.pp, row.layout.vpp, row.batch.num_micro_batches
    assert v is not None
    assert time.parts["pipeline bubble"] / (time.parts["pipeline bubble"] + pipeline) == pytest.approx((p - 1) / (p - 1 + v * m))


def predicted(row: Row, **changes: object) -> float:
    return step_time(row.shape, row.layout, row.hardware, replace(row.training, **changes), row.batch).step_s  # type: ignore[arg-type]


def test_switches_move_time_the_way_they_must() -> None:
    row = ROWS["235b-h100-bf16-deepep"]
    assert predicted(row, overlap=True) < predicted(row) < predicted(row, imbalance=1.5)
    assert predicted(row) < predicted(row, recompute="full") < 1.4 * predicted(row)
    assert predicted(row) < predicted(row, dispatcher="alltoall")
    halved = replace(row.hardware, network_gbs=row.hardware.network_gbs / 2)
    assert step_time(row.shape, row.layout, halved, row.training, row.batch).step_s > predicted(row)


def test_the_first_of_four_stages_holds_four_micro_batches_or_more() -> None:
    plain = ParallelLayout(world_size=4, pp=4)
    assert [micro_batches_in_flight(plain, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(plain, 0, 2) == 2
    interleaved = ParallelLayout(world_size=4, pp=4, vpp=2)
    assert micro_batches_in_flight(interleaved, 0, 16) == (2 * 3 + 4 + 1) / 2


def test_hardware_files_are_complete_and_a_wrong_name_gets_the_nearest() -> None:
    assert {"h100", "h200", "b200", "gb200"} <= set(known_hardware())
    for name in known_hardware():
        assert read_hardware(name).usable_bytes > 0
    with pytest.raises(ValueError, match="did you mean 'h100'"):
        read_hardware("h10")
    with pytest.raises(ValueError, match="mxfp8 is not one of h100's"):
        read_hardware("h100").peak_flops("mxfp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"memory_gb": "80"}, "memory_gb = '80'"), ({"memry_gb": 80}, "did you mean 'memory_gb'"), ({"launch_us": None}, "launch_us = None")],
)
def test_a_wrong_hardware_file_is_refused_with_its_key(change: dict, message: str) -> None:
    values = yaml.safe_load((FOLDER / "h100.yaml").read_text()) | change
    with pytest.raises(ValueError, match=message):
        from_values(values, name="mine", source=FOLDER / "mine.yaml")
