"""A study's smoke: real runs that share a server, whose rows come back when they are lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command, metrics_of

pytestmark = [pytest.mark.servers, pytest.mark.ranks]

STUDY = """\
name: two
output_dir: {folder}
base: configs/tiny_moe_cpu.yaml
axes:
  objective: {{minpro: {{objective.name: minpro}}, m2po: {{objective.name: m2po}}}}
  staleness: [0, 1]
seeds: [5]
reference: {{objective: minpro}}
smoke: {{model.path: {model}, model.warm_up.num_steps: 60, model.warm_up.batch_size: 32, evaluation.num_prompts: 2}}
"""


def test_a_smoke_trains_each_level_and_lost_rows_come_back(
    minpro: Callable[..., Command], finished_run: dict[str, Any], short_run_settings: list[str], tmp_path: Path
) -> None:
    model = short_run_settings[2].removeprefix("model.path=")
    path = tmp_path / "two.yaml"
    path.write_text(STUDY.format(folder=tmp_path, model=model))
    command = minpro("study", str(path), "--smoke")
    code, out, err = command.wait()
    assert code == 0, err
    assert command.survivors() == []
    assert "starting 1 server, shared by the cells" in out
    folder = tmp_path / "two_smoke"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["cell"], row["status"], row["batches"]) for row in rows] == [
        ("minpro_staleness0_seed5", "ok", 2),
        ("m2po_staleness1_seed5", "ok", 2),
    ]
    for row in rows:
        run_dir = folder / "cells" / row["cell"]
        metrics = [line for line in metrics_of(run_dir) if line.get("reward/trained") is not None]
        assert row["curves"]["entropy"] == pytest.approx([line["policy/entropy"] for line in metrics], rel=1e-3)
        assert [line["batch/sampled_at_step"] + row["settings"]["staleness"] for line in metrics] == [
            line["global_step"] for line in metrics
        ]

    # The first row is lost in the middle of a write: it is made again of what its run left, and nothing is trained.
    (folder / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n" + json.dumps(rows[0])[:40])
    code, out, err = minpro("study", str(path), "--smoke").wait()
    assert code == 0, err
    assert "2 cells, 2 have a row; 0 to run" in out
    again = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [{**row, "ended_at": ""} for row in again] == [{**row, "ended_at": ""} for row in reversed(rows)]
    assert "2 of 2 cells are done" in (folder / "report.md").read_text()
