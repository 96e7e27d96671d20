"""rows.jsonl survives crashes and copies, and belongs to one configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from megatron_minpro.config import dump_config
from megatron_minpro.study.cells import Cell
from megatron_minpro.study.rows import ROWS_FILE, Row, append_row, failed_row, finished_row, is_complete, read_rows, rows_of


def test_rows_are_read_back(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    first, second = list(cells.values())[:2]
    written = [make_row(first, reward_last=0.25), failed_row(second, "out of memory")]
    for row in written:
        append_row(tmp_path / "new", row)
    assert list(read_rows(tmp_path / "new").values()) == written


def test_a_torn_last_line_is_no_row_and_is_written_over(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    first, second = (make_row(cell) for cell in list(cells.values())[:2])
    append_row(tmp_path, first)
    with (tmp_path / ROWS_FILE).open("a") as file:
        file.write('{"cell": "half')
    assert list(read_rows(tmp_path)) == [first.cell]
    append_row(tmp_path, second)
    assert list(read_rows(tmp_path)) == [first.cell, second.cell]


def test_the_last_row_of_a_cell_counts(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    cell = next(iter(cells.values()))
    append_row(tmp_path, failed_row(cell, "gone"))
    append_row(tmp_path, make_row(cell))
    assert [row.status for row in read_rows(tmp_path).values()] == ["ok"]


def _append_many(folder: Path, row: Row, count: int) -> None:
    for number in range(count):
        append_row(folder, replace(row, cell=f"{row.cell}_{number}"))


def test_rows_of_several_processes_do_not_mix(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    context = get_context("fork")
    rows = [replace(make_row(cell), error="x" * 5000) for cell in list(cells.values())[:3]]
    writers = [context.Process(target=_append_many, args=(tmp_path, row, 20)) for row in rows]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert set(read_rows(tmp_path)) == {f"{row.cell}_{number}" for row in rows for number in range(20)}


def test_a_row_of_another_configuration_is_refused(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    cell = cells["grpo_staleness2_seed1"]
    append_row(tmp_path, replace(make_row(cell), digest="0", settings={**cell.named, "num_global_steps": 7, "rollout.top_p": 0.5}))
    with pytest.raises(ValueError) as caught:
        rows_of(tmp_path, cells.values())
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl: grpo_staleness2_seed1 was made with another configuration (num_global_steps 7 there, 6 here; "
        "rollout.top_p 0.5 there, None here); expected another name of the study, or the old settings"
    )


def test_a_row_of_another_base_configuration_is_refused(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    cell = cells["grpo_staleness2_seed1"]
    append_row(tmp_path, replace(make_row(cell), digest="0"))
    with pytest.raises(
        ValueError, match=r"configuration \(in settings that the study's file does not name, so those of its base\); expected"
    ):
        rows_of(tmp_path, cells.values())


def test_rows_of_cells_that_are_gone_are_counted(cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    kept, gone = list(cells.values())[:2]
    for cell in (kept, gone):
        append_row(tmp_path, make_row(cell))
    rows, others = rows_of(tmp_path, [kept])
    assert (list(rows), others) == ([kept.name], 1)


@pytest.mark.parametrize("line", ['{"cell": "a"}', "[]", "nonsense"])
def test_a_line_that_is_no_row_is_named(line: str, cells: dict[str, Cell], make_row: Callable[..., Row], tmp_path: Path) -> None:
    append_row(tmp_path, make_row(next(iter(cells.values()))))
    with (tmp_path / ROWS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/rows\.jsonl:2: expected "):
        read_rows(tmp_path)


def write_run(cell: Cell, *, complete: bool = True) -> None:
    """What a run of two batches leaves."""
    run_dir = cell.config.run_dir
    run_dir.mkdir(parents=True)
    lines = [
        {"global_step": 0, "reward/trained": None, "time/step": 1.0},
        {"global_step": 1, "reward/trained": 0.25, "policy/entropy": 2.0, "time/step": 4.0},
        {"global_step": 2, "reward/trained": 0.123456, "policy/entropy": 1.0, "time/step": 6.0},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "result.json").write_text(json.dumps({"complete": complete, "seconds": {"update": 3.14159}}))
    (run_dir / "config.yaml").write_text(dump_config(cell.config))
    for label, value in (("step_000002", 0.5), ("before", 0.25), ("after", 0.375)):
        (run_dir / f"evaluation_{label}.json").write_text(json.dumps({"pass_at_1": value, "policy_version": 3}))


def test_a_row_holds_what_the_run_left(cells: dict[str, Cell]) -> None:
    cell = cells["grpo_staleness2_seed1"]
    write_run(cell)
    row = finished_row(cell)
    assert (row.status, row.batches, row.stride, row.settings, row.digest) == ("ok", 2, 1, cell.named, cell.digest)
    assert dict(row.curves) == {"reward": [0.25, 0.1235], "entropy": [2.0, 1.0]}
    assert dict(row.evaluations) == {"before": {"pass_at_1": 0.25}, "step_000002": {"pass_at_1": 0.5}, "after": {"pass_at_1": 0.375}}
    assert (row.measures["step_s"], row.measures["seconds"]) == (5.0, 11.0)
    assert (row.measures["reward_last"], row.measures["pass_at_1_best"]) == (0.1235, 0.5)
    assert dict(row.seconds) == {"update": 3.142}


def test_seconds_are_those_of_the_launcher_where_it_ran(cells: dict[str, Cell]) -> None:
    cell = cells["grpo_staleness2_seed1"]
    write_run(cell)
    (cell.config.run_dir / "seconds.json").write_text(json.dumps({"train_and_servers": 90.0, "base_model": 500.0}))
    assert finished_row(cell).measures["seconds"] == 90.0


def test_a_stopped_run_is_not_complete(cells: dict[str, Cell]) -> None:
    first, second, third = list(cells.values())[:3]
    write_run(first)
    write_run(second, complete=False)
    assert [is_complete(cell.config.run_dir) for cell in (first, second, third)] == [True, False, False]
