"""The table of planned against rehearsed memory: which runs it holds, when plan and rehearsal agree, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_minpro.cluster.rehearsal_parity import plot, requests, table
from parallel.planner.rehearsed import Parity, parity
from parallel.rehearsal.request import RehearsalRequest
from parallel.rehearsal.result import Fault, PhaseResult, RehearsalResult

REQUESTS = list(requests())


def rehearsed(request: RehearsalRequest, peak: int) -> RehearsalResult:
    phase = PhaseResult(
        name="update",
        before=0,
        peak=peak,
        after=0,
        host_peak=0,
        by_kind={},
        holders=(),
        timeline=(),
        collectives=(),
        waits=(),
        guesses=(),
        kernels=0,
        seconds=0.0,
    )
    return RehearsalResult(
        request=request,
        stage=request.layout.coordinates(request.rank).pp,
        micro_batches=2,
        micro_batch_tokens=22528 // request.layout.cp,
        phases=(phase,),
        fault=None,
        torch_version="",
        layers="",
        host_bytes=0,
    )


def off_by(request: RehearsalRequest, error: float) -> Parity:
    planned = parity(rehearsed(request, 1)).planned.total
    return parity(rehearsed(request, round(planned / (1 + error))))


def test_the_table_holds_every_axis_model_and_recompute_setting() -> None:
    for axis in ("tp", "pp", "vpp", "cp", "ep", "etp"):
        assert any((getattr(request.layout, axis) or 1) > 1 for request in REQUESTS), axis
    assert {request.recompute for request in REQUESTS} == {"full", "selective", "none"}
    assert {request.model["tie_word_embeddings"] for request in REQUESTS} == {True, False}
    assert {request.model["model_type"] for request in REQUESTS} == {"qwen3", "qwen3_moe"}
    assert all(request.layout.world_size >= 8 for request in REQUESTS)


@pytest.mark.parametrize(("error", "agrees"), [(0.0, True), (0.029, True), (0.031, False), (-0.009, True), (-0.011, False)])
def test_a_plan_agrees_within_three_percent_above_and_one_below(error: float, agrees: bool) -> None:
    found = off_by(REQUESTS[0], error)
    assert found.error == pytest.approx(error, abs=1e-6) and found.agrees is agrees


def test_the_table_names_both_figures_and_the_picture_is_drawn(tmp_path: Path) -> None:
    found = [off_by(REQUESTS[0], 0.02), off_by(REQUESTS[-1], -0.005)]
    console = Console(record=True, width=200)
    console.print(table(found))
    shown = console.export_text()
    assert "+2.00%" in shown and "-0.50%" in shown and "qwen3_30b_a3b" in shown and "qwen3_1.7b" in shown
    plot(found, tmp_path / "parity.png")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_a_rehearsal_that_a_fault_ended_has_no_parity() -> None:
    fault = Fault(phase="update", kind="DeviceFault", message="a dtype", of_device=True)
    with pytest.raises(ValueError, match="qwen3_30b_a3b, rank 0: the rehearsal ended in update: a dtype"):
        parity(replace(rehearsed(REQUESTS[0], 1), fault=fault))
