"""`minpro scale`: one real study of two layouts, a third that is illegal, taken up again; predictions alone; wrong input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_minpro import cli
from megatron_minpro.scaling.rows import Row
from parallel.planner.plan import make_plan

CONFIG = "configs/tiny_moe_cpu.yaml"
STUDY = ("--ep", "1,2,3", "--scaling", "strong", "--measure", "--steps", "3", "--warm-up", "1")


def rows_in(folder: Path, kind: str) -> dict[int, Row]:
    """By ep, of the table that the last command wrote."""
    rows = [Row(**json.loads(line)) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {row.ep: row for row in rows if row.kind == kind}


@pytest.mark.ranks
def test_a_measured_study_records_what_ran_and_is_taken_up_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study"
    command = ["scale", CONFIG, *STUDY, "--out", str(out), f"model.path={tmp_path / 'absent'}"]
    assert cli.run(command) == 0, capsys.readouterr().err
    measured = rows_in(out, "measured")
    assert {ep: row.status for ep, row in measured.items()} == {1: "ok", 2: "ok", 3: "illegal"}
    assert "ep=3 does not divide 8 experts" in (measured[3].reason or "")
    for ep in (1, 2):
        row = measured[ep]
        assert (row.world_size, row.dp, row.steps, row.micro_batches, row.device) == (ep, ep, 3, 1, "CPU")
        assert row.weights == "random"  # model.path is yet to be made
        assert row.step_s_min <= row.step_s <= row.step_s_max
        # 16 sequences of 64 + 56 tokens.
        assert row.tokens_per_s_per_gpu * row.step_s * row.world_size == pytest.approx(16 * 120)
        assert row.peak_allocated_gb is None and row.peak_rss_gb > row.rss_before_gb > 0.05
        assert row.bubble == 0.0  # no pipeline
        # Every token chooses 2 of 8 experts: a micro-batch of each rank, 1,920 tokens together.
        assert row.expert_load_mean == 16 * 120 * 2 / 8
        assert row.expert_load_max >= row.expert_load_mean
    assert measured[1].exposed_s == {}
    assert measured[2].exposed_s["dispatch"] > 0 and sum(measured[2].exposed_s.values()) < measured[2].explained_s
    assert measured[1].rank_imbalance == 1.0 <= measured[2].rank_imbalance <= 2.0
    pictures = {path.name for path in (out / "plots").iterdir()}
    assert pictures == {f"{name}.png" for name in ("throughput", "efficiency", "memory", "step_time", "predicted_and_measured")}
    assert "ep 3: illegal" in (out / "report.md").read_text()

    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()}
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    assert said.count("is there already") == 3
    assert {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()} == before  # no rank was started
    assert rows_in(out, "measured") == measured


def test_predictions_are_the_planners(tmp_path: Path) -> None:
    from megatron_minpro.cluster import planning
    from megatron_minpro.cluster.training_choice import TrainingChoice
    from megatron_minpro.config import load_config
    from parallel.planner.hardware import read_hardware

    path, settings = "configs/qwen3_30b_a3b.yaml", ["parallel.tp=1", "parallel.cp=1", "parallel.ep=8", "world_size=8"]
    assert (
        cli.run(
            ["scale", path, *settings, "--ep", "1,8", "--predict", "--world-size", "8", "--out", str(tmp_path / "p"), "--hardware", "h200"]
        )
        == 0
    )
    rows = rows_in(tmp_path / "p", "predicted")
    config = load_config(path, settings)
    machine = read_hardware("h200")
    training = planning.training_of(config, machine, TrainingChoice())
    work = planning.reinforcement_work(config, mean_tokens=None, colocated=False)
    work = replace(work, keeps_weights=False)  # an optimizer step alone
    plan = make_plan(planning.shape_of(config), config.layout, training, machine, work)
    assert rows[8].step_s == pytest.approx(plan.time.step_s)
    assert rows[8].predicted_total_gb == pytest.approx(1e-9 * plan.fullest.total)
    assert (rows[1].status, rows[8].status) == ("does_not_fit", "ok")  # all experts on one GPU do not
    assert "GB too much, largest part" in (rows[1].reason or "")
    assert len((tmp_path / "p/rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ep", "1,2"], "expected --predict, --measure, --routing-study or --report"),
        (["--predict"], "--ep: missing"),
        (["--ep", "1,two", "--predict"], "--ep: '1,two', expected whole numbers"),
        (["--ep", "3,5", "--predict"], "--ep: no layout can be run; the first: parallel: ep=3 does not divide 8 experts"),
        (["--ep", "2", "--predict", "--hardware", "h10"], "did you mean 'h100'?"),
        (["--ep", "1,2", "--measure", "--row", "9"], "--row: 9, expected 0 to 2"),
        (["--ep", "1,2", "--measure", "--nodes", "2"], "expected --row beside it"),
        (["--ep", "1", "--predict", "--mean-tokens", "57"], "--mean-tokens: 57 is more than rollout.max_new_tokens = 56"),
        (["--ep", "1", "--measure", "model.path=absent", "model.warm_up=null"], "/absent does not exist"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["scale", CONFIG, *arguments, "--out", str(tmp_path / "study")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_study_of_other_settings_is_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["scale", CONFIG, "--ep", "1", "--predict", "--out", str(tmp_path)]
    assert cli.run(command) == 0
    assert cli.run([*command, "--imbalance", "1.5"]) == 2
    assert "holds another study (imbalance: 1.0 there, 1.5 here)" in capsys.readouterr().err
    assert cli.run(["scale", CONFIG, "--ep", "1,2", "--predict", "--out", str(tmp_path)]) == 0  # a longer list is the same study
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["ep"], row["sequences"], row["scalings"]) for row in rows] == [(1, 16, "strong weak"), (2, 16, "strong"), (2, 32, "weak")]


def test_a_dry_run_lists_the_layouts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["scale", CONFIG, "--ep", "1,2,3", "--scaling", "strong", "--measure", "--dry-run", "--out", str(tmp_path / "study")]
    assert cli.run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "would be studied",
        "would be studied",
        "parallel: ep=3 does not divide 8 experts",
    ]
    assert list(tmp_path.iterdir()) == []
