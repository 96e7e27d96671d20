"""`minpro rehearse` from the outside: four layers of the production run, and one line with exit code 2 for what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro import cli
from megatron_minpro.cluster import rehearsing
from megatron_minpro.commands import rehearsal_table
from megatron_minpro.config import load_config
from parallel.planner.hardware import read_hardware
from parallel.planner.models import find_config
from parallel.rehearsal.result import Fault, RehearsalResult

PRODUCTION = "configs/qwen3_30b_a3b.yaml"


def rehearse(*arguments: str) -> int:
    return cli.run(["rehearse", *arguments])


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Four layers of the true 30B shape on the production layout: the only rehearsal of this file."""
    folder = tmp_path_factory.mktemp("rehearsal")
    assert rehearse(PRODUCTION, "--layers", "4", "--out", str(folder)) == 0
    return json.loads((folder / "rehearsal.json").read_text())["ranks"][0], folder


@pytest.fixture(scope="module")
def result(production: tuple[dict[str, Any], Path]) -> RehearsalResult:
    values = {key: value for key, value in production[0].items() if key not in ("limit_bytes", "planned_bytes")}
    return RehearsalResult.from_json(values)


def test_state_of_the_production_run_is_what_a_hand_counts(result: RehearsalResult) -> None:
    # Qwen3-30B-A3B on rank 0 of tp 2, cp 4, ep 8, dp 2, four layers. Embedding and head are halved by tp; so is attention.
    vocabulary = 2 * 151936 * 2048 // 2
    attention = (2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048) // 2
    norms_and_router = 2 * 2048 + 2 * 128 + 128 * 2048
    dense = vocabulary + 4 * (attention + norms_and_router) + 2048
    experts = 4 * (128 // 8) * 3 * 2048 * 768
    held = result.phase("build").by_kind
    assert held["parameters"] == pytest.approx(2 * (dense + experts), rel=1e-6)
    assert held["gradients"] == pytest.approx(4 * (dense + experts), rel=1e-6)
    assert held["optimizer"] == pytest.approx(12 * (dense / 8 + experts / 2), rel=2e-3)  # fp32 weights and two moments, a share each
    assert result.phase("keep").by_kind["kept weights"] == held["parameters"]


def test_construction_needs_no_more_than_what_stays(result: RehearsalResult) -> None:
    build = result.phase("build")
    assert build.peak < 1.001 * build.after


def test_an_update_leaves_no_activations_behind(result: RehearsalResult) -> None:
    # Megatron keeps a buffer of gathered tokens, 11,264 x 2048 bf16 numbers, and routing maps; the graph of the router must go.
    buffer = 11264 * 2048 * 2
    assert result.phase("update").after - result.phase("keep").after < 1.5 * buffer


def test_expert_traffic_of_an_update_is_what_a_hand_counts(result: RehearsalResult) -> None:
    traffic = {(each.kind, each.group): each for each in result.phase("update").collectives}["all_to_all", "ep"]
    # 45,056 tokens over cp 4 and sp 2, to 8 experts each; 2048 bf16 numbers out and back and an fp32 probability.
    rows = 45056 // 4 // 2 * 8
    once = rows * (2 * 2048 * 2 + 4)
    assert traffic.bytes_in == pytest.approx(4 * 3 * once, rel=0.01)  # 4 layers: forward, recomputed, backward


def test_the_report_shows_memory_collectives_and_waits(production: tuple[dict[str, Any], Path]) -> None:
    report = (production[1] / "report.md").read_text()
    for title in ("memory of rank 0, GB", "largest holders at the peak of", "collectives; GB", "the host waits for the device"):
        assert title in report
    assert "the plan says" in report and "Not modelled" in report
    assert (production[1] / "rank_0.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def verdict(result: RehearsalResult) -> rehearsing.Verdict:
    return rehearsing.Verdict(result=result, limit_bytes=76e9, planned_bytes=result.fullest.peak)


@pytest.fixture
def plan() -> Any:
    run = load_config(PRODUCTION)
    model = find_config(run.model.path, architecture=None)
    return rehearsing.plan_of(run, model, read_hardware("h100"), layers=4)


def test_a_run_that_fits_has_no_failure(verdict: rehearsing.Verdict, plan: Any) -> None:
    assert verdict.fits and verdict.plan_error == 0
    assert rehearsing.failure([verdict], plan) is None


def test_a_run_that_does_not_fit_names_the_largest_holders(verdict: rehearsing.Verdict, plan: Any) -> None:
    small = replace(verdict, limit_bytes=5e9)
    reason = rehearsing.failure([verdict, small], plan)
    assert reason is not None and "\n" not in reason
    assert "rank 0 does not fit: update needs" in reason and "of 5.0 GB; largest holders: 2.6 GB gradients of" in reason


def test_a_fault_comes_before_memory(verdict: rehearsing.Verdict, plan: Any) -> None:
    fault = Fault(phase="update", kind="DeviceFault", message="a tensor on the CPU", of_device=True)
    reason = rehearsing.failure([replace(verdict, result=replace(verdict.result, fault=fault), limit_bytes=1.0)], plan)
    assert reason == "rank 0, update: CUDA or NCCL would raise: a tensor on the CPU"


def test_lengths_are_read_with_repetitions() -> None:
    assert rehearsing.read_lengths("22528x2, 1000,5x3") == (22528, 22528, 1000, 5, 5, 5)


def test_the_default_fills_the_micro_batches_of_every_replica() -> None:
    run = load_config(PRODUCTION)
    assert rehearsing.fullest_lengths(run, micro_batches=3) == (22528,) * (2 * 2 * 3)  # dp, two to a micro-batch


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((PRODUCTION, "parallel.tp=3"), "parallel: "),
        ((PRODUCTION, "--layers", "5", "parallel.pp=2", "world_size=32"), "parallel: pp=2 does not divide 5 layers"),
        ((PRODUCTION, "model.path=nowhere/at-all"), "nowhere/at-all does not exist"),
        ((PRODUCTION, "--model-config", "configs"), "configs/config.json: cannot be read"),
        ((PRODUCTION, "--rank", "16"), "parallel: rank=16 is outside world_size=16"),
        ((PRODUCTION, "--stage", "1"), "--stage: 1, expected less than parallel.pp = 1"),
        ((PRODUCTION, "--stage", "0", "--rank", "0"), "--rank and --stage: expected one of them"),
        ((PRODUCTION, "--lengths", "many"), "--lengths: 'many', expected tokens of sequences"),
        ((PRODUCTION, "--lengths", "9", "--micro-batches", "2"), "--micro-batches follows from --lengths"),
        ((PRODUCTION, "--hardware", "h1000"), "hardware: 'h1000' does not exist"),
        ((PRODUCTION, "--dtype", "int4"), "model.dtype"),
        ((PRODUCTION, "actor.layers=transformer_engine"), "actor.layers: transformer_engine cannot be rehearsed"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("minpro: error: ") and error.count("\n") == 1
    assert said in error


def test_a_report_becomes_a_row_of_the_page(production: tuple[dict[str, Any], Path], result: RehearsalResult) -> None:
    [row] = rehearsal_table.rows([production[0]], "qwen3_30b_a3b")
    assert row[:4] == ("`qwen3_30b_a3b`", "4", "16 GPUs: tp 2, cp 4, ep 8, dp 2", "0")
    assert row[4:8] == tuple(f"{result.phase(name).peak / 1e9:.1f}" for name in ("build", "score", "update", "export"))


def test_the_page_keeps_what_stands_around_its_table() -> None:
    page = f"above\n{rehearsal_table.BEGIN}\nold\n{rehearsal_table.END}\nbelow\n"
    changed = rehearsal_table.replace_table(page, "| new |")
    assert changed == f"above\n{rehearsal_table.BEGIN}\n| new |\n{rehearsal_table.END}\nbelow\n"
    assert rehearsal_table.BEGIN in rehearsal_table.PAGE.read_text(encoding="utf-8")
