"""A study's smoke: real runs that share a server, whose rows come back when they are lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ROOT, Command, metrics_of, without_times

pytestmark = [pytest.mark.servers, pytest.mark.ranks]

# As the finished run of the other tests, which no study has started.
STUDY = """\
name: two
output_dir: {folder}
base: configs/tiny_moe_cpu.yaml
axes:
  objective: {{m2po: {{objective.name: m2po}}, minpro: {{objective.name: minpro}}}}
  staleness: [0, 2]
seeds: [0]
reference: {{objective: minpro}}
smoke:
  model.path: {model}
  model.warm_up.num_steps: 60
  model.warm_up.batch_size: 32
  num_global_steps: 5
  rollout.prompts_per_step: 8
  actor.updates_per_step: 4
  evaluation.num_prompts: 8
"""


def test_a_smoke_trains_each_level_and_lost_rows_come_back(
    minpro: Callable[..., Command], finished_run: dict[str, Any], short_run_settings: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(STUDY.format(folder=tmp_path, model=short_run_settings[2].removeprefix("model.path=")))
    command = minpro("study", str(path), "--smoke")
    code, out, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    assert "starting 1 server, shared by the cells" in out
    folder = tmp_path / "two_smoke"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["cell"], row["status"], row["batches"]) for row in rows] == [
        ("m2po_staleness0_seed0", "ok", 5),
        ("minpro_staleness2_seed0", "ok", 5),
    ]
    # Neither the fork, nor the serial schedule, nor the server that another run has used moves a number.
    metrics = metrics_of(folder / "cells/minpro_staleness2_seed0")
    assert without_times(metrics) == without_times(finished_run["metrics"])
    entropies = [line["policy/entropy"] for line in metrics if line.get("policy/entropy") is not None]
    assert rows[1]["curves"]["entropy"] == pytest.approx(entropies, rel=1e-3)

    # The first row is lost in the middle of a write: it is made again of what its run left, and nothing is trained.
    (folder / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n" + json.dumps(rows[0])[:40])
    code, out, err = minpro("study", str(path), "--smoke").wait()
    assert code == 0, err
    assert "2 cells, 2 have a row; 0 to run" in out
    again = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [{**row, "ended_at": ""} for row in again] == [{**row, "ended_at": ""} for row in reversed(rows)]
    assert "2 of 2 cells are done" in (folder / "report.md").read_text()


def test_the_smoke_of_the_shipped_sweep_trains_every_objective(minpro: Callable[..., Command], tmp_path: Path) -> None:
    """configs/study/lag_sweep_tiny.yaml as it is, in a folder of its own."""
    path = tmp_path / "lag_sweep_tiny.yaml"
    path.write_text(f"output_dir: {tmp_path}\n" + (ROOT / "configs/study/lag_sweep_tiny.yaml").read_text())
    command = minpro("study", str(path), "--smoke")
    code, _, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    folder = tmp_path / "lag_sweep_tiny_smoke"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * 14
    assert len({row["levels"]["objective"] for row in rows}) == 14 and {row["levels"]["staleness"] for row in rows} == {"0", "2", "8"}
    assert {row["batches"] for row in rows if row["levels"]["staleness"] == "8"} == {9}, "one batch at the full lag"
    assert "14 of 14 done" in (folder / "report.html").read_text()
