"""`minpro compare`: what a person reads in 80 columns, and the same for programs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from megatron_minpro.cli import run
from megatron_minpro.report.comparison import Comparison, compare
from megatron_minpro.report.comparison_text import print_comparison
from megatron_minpro.report.runs import read_run

WriteRun = Callable[..., Path]


def make_runs(write_run: WriteRun, suffix: str = "") -> list[Path]:
    """Two objectives with the seeds 1 and 2; the last rewards are 0.2 and 0.4, 0.5 and 0.5."""
    named = (("grpo", 1, 0.2), ("grpo", 2, 0.4), ("cispo", 1, 0.5), ("cispo", 2, 0.5))
    return [
        write_run(f"{name}{suffix}_seed{seed}", f"objective.name={name}", f"seed={seed}", rewards=(0.1, last)) for name, seed, last in named
    ]


def text_of(comparison: Comparison, *, width: int) -> list[str]:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width, highlight=False))
    return out.getvalue().splitlines()


def test_all_parts_are_printed_with_numbers_by_hand(write_run: WriteRun) -> None:
    lines = [" ".join(line.split()) for line in text_of(compare([read_run(path) for path in make_runs(write_run)]), width=80)]
    assert "1 grpo_seed1 1 complete 3" in lines
    assert "objective.name grpo: 1-2" in lines and "cispo: 3-4" in lines
    assert "2 grpo_seed2 0.100 0.400 0.400" in lines, "reward, first, last and best"
    assert "run pass@1, before pass@1, after pass@1, best" in lines and "4 cispo_seed2 0.250 0.375 0.500" in lines
    assert "grpo 0.100 ± 0.000 0.300 ± 1.271 0.300 ± 1.271" in lines  # 12.706 x 0.1
    assert "cispo minus grpo, seed by seed" in lines
    assert "reward, last +0.200 -1.071 to +1.471 0.3 2 2 0" in lines  # t = 2 with 1 degree: p = 1 - 2 atan(2) / pi = 0.295


def test_eighty_columns_break_no_word_of_long_names(write_run: WriteRun) -> None:
    paths = make_runs(write_run, suffix="_staleness8_group_size16_long")
    (paths[3] / "config.yaml").unlink()
    lines = text_of(compare([read_run(path) for path in paths]), width=80)
    assert max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert {"grpo_staleness8_group_size16_long_seed2", "pass@1,", "objective.name", "unknown:", "settings"} <= words
    header = next(line for line in lines if line.startswith("group ") and "pass@1, before" in line)
    assert header.rstrip().endswith("pass@1, best")


def test_the_command_prints_json_and_takes_a_further_reference(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    grpo, _, cispo, _ = make_runs(write_run)
    assert run(["compare", str(cispo), "--reference", str(grpo), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["label"] for each in found["runs"]] == ["grpo_seed1", "cispo_seed1"]
    (last,) = [each for each in found["differences"] if each["measure"] == "reward_last"]
    assert (found["reference"], last["group"], last["interval"]["low"], last["p"]) == ("grpo_seed1", "cispo_seed1", None, None)
    assert last["interval"]["mean"] == pytest.approx(0.3)
    assert found["settings"]["objective.name"] == ["grpo", "cispo"] and found["notes"] == []


def test_a_folder_without_a_run_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"minpro: error: {tmp_path}: holds neither config.yaml nor metrics.jsonl; expected the folder of a run\n"
    )
