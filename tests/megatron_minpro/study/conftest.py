"""A small study and rows that no run has made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.study.cells import Cell, make_cells
from megatron_minpro.study.definition import Study, read_study
from megatron_minpro.study.rows import Row

STUDY = """\
name: small
base: tiny_moe_cpu
overrides: {num_global_steps: 6}
axes:
  objective:
    cispo: {objective.name: cispo}
    grpo: {objective.name: grpo}
    minpro: {objective.name: minpro}
  staleness: [0, 2]
seeds: [1, 2, 3]
reference: {objective: cispo}
figures:
  - {name: two, curve: reward, where: {objective: [cispo, minpro], staleness: 2}}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """In a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(STUDY)
    return read_study("small.yaml")


@pytest.fixture
def cells(study: Study) -> dict[str, Cell]:
    return {cell.name: cell for cell in make_cells(study)}


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """Of a cell that ended well, with these measures."""

    def make(cell: Cell, **measures: float) -> Row:
        return Row(
            cell=cell.name,
            levels=dict(cell.levels),
            seed=cell.seed,
            status="ok",
            digest=cell.digest,
            settings=dict(cell.named),
            measures={"reward_last": 0.5, "collapsed": 0.0, "seconds": 60.0, "step_s": 5.0, **measures},
            batches=3,
            curves={"reward": [0.1 * cell.seed, 0.2, None], "clip_hard": [0.1, 0.1, 0.1], "clip_soft": [0.2, None, 0.0]},
        )

    return make
