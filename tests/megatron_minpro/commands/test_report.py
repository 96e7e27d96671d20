"""`minpro report` on run folders at several points of their life."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.cli import run
from megatron_minpro.config import dump_config, load_config

REPOSITORY = Path(__file__).resolve().parents[3]
RESULT = {"policy_version": 32, "trained_batches": 2, "rollouts_sampled": 512, "rollouts_trained": 512}
RESULT |= {"rollouts_lost": 0, "rollouts_dropped": 0}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", ["staleness=0", "name=small"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    lines = [
        {"global_step": step, "reward/trained": 0.25 * step, "batch/lag_min": 0, "batch/lag_max": 15, "batch/tokens": 100, "time/step": 4.0}
        for step in range(2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def finish(run_dir: Path, **changes: Any) -> None:
    (run_dir / "result.json").write_text(json.dumps({**RESULT, "complete": True, "seconds": {"update": 1.0, "total": 2.0}, **changes}))


def test_a_complete_run_gets_its_summary_and_plots_anew(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(run_dir)
    (run_dir / "seconds.json").write_text('{"total": 9.0}')
    assert run(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.startswith("small: 2 global steps (32 updates) of minpro with staleness 0 (policy lag 0 to 15")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["reward_first"], summary["reward_last"], summary["tokens_per_second"]) == (0.0, 0.25, 25.0)
    assert summary["seconds"] == {"update": 1.0, "total": 9.0}
    assert [path.name for path in (run_dir / "plots").iterdir()] == ["reward.png"]
    assert (run_dir / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(("result", "said"), [(None, "not at its end"), ({"complete": False}, "stopped after 2 trained batches")])
def test_a_run_that_is_not_complete_gets_its_plots_and_a_page(
    result: dict[str, bool] | None, said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if result is not None:
        finish(run_dir, **result)
    assert run(["report", str(run_dir), "--out", str(run_dir / "other.html")]) == 0
    out = capsys.readouterr().out
    assert said in out and out.endswith(f"page: {run_dir / 'other.html'}\n")
    assert (run_dir / "other.html").exists() and not (run_dir / "report.html").exists()
    assert (run_dir / "plots/reward.png").exists() and not (run_dir / "summary.json").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.yaml").unlink(), "holds no config.yaml"),
        (lambda folder: (folder / "config.yaml").write_text("steps: 3\n"), "unknown key steps"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "holds no metrics.jsonl"),
        (lambda folder: (folder / "result.json").write_text("{"), "result.json: expected a JSON object"),
    ],
)
def test_of_a_damaged_folder_the_page_shows_what_is_there(
    damage: Any, said: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run_dir)
    assert run(["report", str(run_dir)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{run_dir}: neither summary.json nor plots: ") and said in out[0]
    assert (run_dir / "report.html").exists() and not (run_dir / "summary.json").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    assert "holds neither config.yaml nor metrics.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_page_about_several_runs_needs_a_place(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(run_dir), str(run_dir)]) == 2
    assert capsys.readouterr().err == "minpro: error: --out: missing, expected the path of the page about 2 runs, as in --out report.html\n"
    assert run(["report", str(run_dir), "--out", str(run_dir)]) == 2
    assert f"--out: {run_dir} is a folder, expected the path of a file" in capsys.readouterr().err
    assert run(["report", str(run_dir), "--out", str(run_dir / "none" / "page.html")]) == 2
    assert f"--out: {run_dir / 'none'} is no folder, expected one that exists" in capsys.readouterr().err
