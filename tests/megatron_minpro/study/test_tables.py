"""Comparisons, tables and pictures of made-up rows, and what a cell would cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro.cli import run
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.costs import cost_of
from megatron_minpro.study.curves import mean_curve
from megatron_minpro.study.definition import Study
from megatron_minpro.study.dry_run import describe
from megatron_minpro.study.durations import duration
from megatron_minpro.study.plots import plot_study
from megatron_minpro.study.rows import Row, append_row, failed_row
from megatron_minpro.study.summary import compare, make_groups
from megatron_minpro.study.tables import write_tables
from parallel.planner.hardware import read_hardware

REWARDS = {"cispo": [0.50, 0.60, 0.70], "grpo": [0.40, 0.60, 0.50], "minpro": [0.61, 0.70, 0.79]}


@pytest.fixture
def rows(cells: dict[str, Cell], make_row: Callable[..., Row]) -> dict[str, Row]:
    """At staleness 2 all cells; at 0 only one seed of the reference, and a failure."""
    found = {
        cell.name: make_row(cell, reward_last=REWARDS[cell.levels["objective"]][cell.seed - 1], collapsed=float(cell.seed == 1))
        for cell in cells.values()
        if cell.levels["staleness"] == "2"
    }
    found["cispo_staleness0_seed1"] = make_row(cells["cispo_staleness0_seed1"])
    found["grpo_staleness0_seed1"] = failed_row(cells["grpo_staleness0_seed1"], "a server died")
    return found


def test_the_report_shows_weights_along_a_response(study: Study, rows: dict[str, Row], tmp_path: Path) -> None:
    name = "minpro_staleness2_seed1"
    places = {
        "weight/tokens_16_31": 0.25,
        "log_prefix_min/tokens_16_31": -0.693147,
        "weight/tokens_2_3": 0.9,
        "log_prefix_min/tokens_2_3": 0.0,
    }
    rows[name] = replace(rows[name], measures={**rows[name].measures, **places})
    text = write_tables(tmp_path, study, rows, total=18)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["weight / smallest earlier ratio", "tokens 2 3", "tokens 16 31"] in lines
    assert ["minpro_staleness2", "0.90 / 1.00", "0.25 / 0.50"] in lines and ["grpo_staleness2", "-", "-"] in lines


def test_comparisons_are_paired_within_a_lag(study: Study, rows: dict[str, Row]) -> None:
    groups = make_groups(study, rows)
    assert [(group.name, len(group.rows), group.failed, group.missing) for group in groups[:3]] == [
        ("cispo_staleness0", 1, 0, 2),
        ("cispo_staleness2", 3, 0, 0),
        ("grpo_staleness0", 0, 1, 2),
    ]
    found = compare(study, groups, ["reward_last"])
    assert [(each.group.name, each.reference.name) for each in found] == [
        ("grpo_staleness2", "cispo_staleness2"),
        ("minpro_staleness2", "cispo_staleness2"),
    ]
    grpo, minpro = found
    # Differences -0.1, 0, -0.2: t = -0.1 / (0.1 / sqrt 3) = -1.732, p of 2 degrees = 0.2254. 0.11, 0.1, 0.09: t = 17.32, p = 0.003317.
    assert (grpo.difference.p, minpro.difference.p) == (pytest.approx(0.22540, abs=1e-5), pytest.approx(0.0033168, abs=1e-6))
    assert (grpo.holm, minpro.holm) == (pytest.approx(0.22540, abs=1e-5), pytest.approx(2 * 0.0033168, abs=2e-6))
    assert (grpo.difference.negative, grpo.difference.positive, minpro.difference.positive) == (2, 0, 3)


def test_the_report_says_means_differences_and_failures(study: Study, rows: dict[str, Row], tmp_path: Path) -> None:
    text = write_tables(tmp_path, study, rows, total=18, pictures=["plots/reward.png"])
    assert (tmp_path / "report.md").read_text() == text
    assert "10 of 18 cells are done, 1 failed" in text
    # 0.61, 0.70, 0.79: standard error 0.09 / sqrt 3, times 4.3027
    assert "| minpro_staleness2 | 3     | 0.700 ± 0.224" in text and "| 1 of 3    |" in text
    assert "| minpro    | +0.100 [+0.075, +0.125] p 0.0066 (3+ 0-) * |" in text
    assert "| grpo      | -0.100 [-0.348, +0.148] p 0.23 (0+ 2-) " in text and "(0+ 2-) *" not in text
    assert "- grpo_staleness0_seed1: a server died" in text
    assert "With 3 seeds an exact sign-flip test has no p below 0.25" in text
    assert "![reward](plots/reward.png)" in text
    assert "minpro_staleness0" not in text


def test_tables_for_programs_have_a_line_for_each_combination(study: Study, rows: dict[str, Row], tmp_path: Path) -> None:
    write_tables(tmp_path, study, rows, total=18)
    lines = json.loads((tmp_path / "table.json").read_text())
    [minpro] = [line for line in lines if line["cells"] == "minpro_staleness2"]
    assert (minpro["objective"], minpro["staleness"], minpro["seeds"]) == ("minpro", "2", 3)
    assert (minpro["reward_last"], minpro["reward_last_difference"]) == (pytest.approx(0.7), pytest.approx(0.1))
    with (tmp_path / "table.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [line["cells"] for line in found] == [line["cells"] for line in lines]
    assert float(found[-1]["reward_last_difference_p_holm"]) == minpro["reward_last_difference_p_holm"]


def test_a_curve_is_the_mean_over_the_seeds_that_have_the_point(cells: dict[str, Cell], make_row: Callable[..., Row]) -> None:
    mine = [make_row(cells[f"grpo_staleness2_seed{seed}"]) for seed in (1, 2)]
    longer = replace(make_row(cells["grpo_staleness2_seed3"]), stride=2)  # its points lie elsewhere
    reward, clipped = (mean_curve([*mine, longer], names) for names in (["reward"], ["clip_hard", "clip_soft"]))
    assert [(step, point.mean, point.count) for step, point in reward] == [(1, pytest.approx(0.15), 2), (2, 0.2, 2)]
    assert [(step, point.mean) for step, point in clipped] == [(1, pytest.approx(0.3)), (2, 0.1), (3, 0.1)]


def test_pictures_without_data_are_not_drawn(study: Study, rows: dict[str, Row], tmp_path: Path) -> None:
    assert plot_study(tmp_path, study, rows) == ["plots/reward.png", "plots/clipped.png", "plots/two.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("plots/reward.png", "plots/two.png"))


def test_costs_come_from_rows_then_smoke_runs(cells: dict[str, Cell], make_row: Callable[..., Row]) -> None:
    cell = cells["grpo_staleness2_seed1"]
    like = {"a": replace(make_row(cell, seconds=100.0), cell="a"), "b": make_row(cells["grpo_staleness0_seed1"], seconds=50.0)}
    assert cost_of(cell, like, {}, machine=None, mean_tokens=None).seconds == 100.0
    assert cost_of(cells["cispo_staleness0_seed1"], like, {}, machine=None, mean_tokens=None).seconds == 75.0
    short = make_row(cell, seconds=30.0, step_s=2.0)
    short = replace(short, settings={**cell.named, "num_global_steps": 3, "rollout.prompts_per_step": 4})
    found = cost_of(cell, {}, {"a": short}, machine=None, mean_tokens=None)
    # 24 s around 3 steps of 2 s; 6 steps of 32 prompts in place of 4
    assert (found.seconds, found.source) == (24.0 + 6 * 2.0 * 8, "scaled from a smoke run")
    unknown = cost_of(cell, {}, {}, machine=None, mean_tokens=None)
    assert (unknown.seconds, unknown.gpu_hours, unknown.source) == (None, None, "not known: run --smoke")


def test_a_cell_for_gpus_costs_what_the_plan_says(cells: dict[str, Cell]) -> None:
    from megatron_minpro.config import load_config

    config = load_config("qwen3_30b_a3b")
    cell = replace(cells["grpo_staleness2_seed1"], config=config)
    found = cost_of(cell, {}, {}, machine=read_hardware("h100"), mean_tokens=None)
    assert found.gpus == 16 + 8 * 2
    assert found.seconds == pytest.approx(120 * 5538.99, rel=1e-4)  # `minpro plan qwen3_30b_a3b`: global_step_s
    assert found.gpu_hours == pytest.approx(32 * 120 * 5538.99 / 3600, rel=1e-4)


def test_the_dry_run_adds_up_what_is_left(cells: dict[str, Cell], rows: dict[str, Row]) -> None:
    text = describe(list(cells.values()), rows, {}, machine=None, mean_tokens=None, not_checked=["the moon"])
    assert "18 cells, 7 to run: 7 min one after the other" in text  # 60 s each
    assert "| minpro    | 2         | 3     | 0      | 60 s           | measured |" in text
    assert text.endswith("not checked: the moon")


@pytest.mark.parametrize(
    ("seconds", "expected"), [(45.4, "45 s"), (600, "10 min"), (12_000, "3 h 20 min"), (450_000, "5.2 days"), (0, "0 s")]
)
def test_durations_in_words(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_the_command_reports_rows_that_were_copied_here(
    study: Study, rows: dict[str, Row], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for row in rows.values():
        append_row(study.folder, row)
    assert run(["study", "small.yaml", "--report"]) == 0
    assert "11 rows; written to runs/studies/small: report.html, report.md" in capsys.readouterr().out
    assert "10 of 18 cells are done" in (tmp_path / "runs/studies/small/report.md").read_text()


OPTIONS = [
    (["--report", "--slurm"], "--report --slurm: expected one of them"),
    (["--smoke", "--jobs", "2"], "--jobs: 2, expected 1 with --smoke, whose cells share their servers one after the other"),
    (["--smoke", "--cell", "0"], "--smoke: expected neither --slurm nor --cell beside it"),
    (["--mean-tokens", "5"], "--mean-tokens: expected --dry-run beside it"),
    (["--cell", "18"], "--cell: 18, expected 0 to 17: the study has 18 cells"),
    (["--report"], "runs/studies/small: holds no row of the study's cells"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[" ".join(options) for options, _ in OPTIONS])
def test_options_that_make_no_sense_end_with_2(options: list[str], message: str, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "small.yaml", *options]) == 2
    assert capsys.readouterr().err == f"minpro: error: {message}\n"


def test_a_folder_that_another_process_uses_is_refused(study: Study, cells: dict[str, Cell], capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    study.folder.mkdir(parents=True)
    with (study.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(["study", "small.yaml"]) == 2
    assert capsys.readouterr().err.strip().endswith("its cells are being run by another process; expected another name of the study")


def test_slurm_gives_a_job_for_each_cell_that_is_left(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_text(f"name: big\noutput_dir: {tmp_path}\nbase: qwen3_30b_a3b\naxes: {{staleness: [0, 2]}}\nseeds: [1, 2]\n")
    assert run(["study", str(path), "--slurm", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = tmp_path / "big/cells/staleness0_seed1"
    assert lines[1] == (
        f"job0=$(CONFIG={first}.yaml RUN_DIR={first} sbatch --parsable --job-name=staleness0_seed1 slurm/qwen3_30b_a3b.sbatch)"
    )
    assert [line.count("--dependency") for line in lines[1:]] == [0, 0, 1, 1]
    assert '--dependency="afterany:$job1"' in lines[4]
    assert "staleness: 0" in Path(f"{first}.yaml").read_text()
