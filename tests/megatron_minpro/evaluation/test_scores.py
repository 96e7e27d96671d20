"""From counts to numbers and tables, by numbers worked by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_minpro.evaluation.compare import comparison_table, differences
from megatron_minpro.evaluation.curves import plot_curves
from megatron_minpro.evaluation.problems import Problem
from megatron_minpro.evaluation.results import table_2
from megatron_minpro.evaluation.scores import Counts, Incomplete, as_json, average_curves, average_pass_at_1, count, pass_at_k_table
from megatron_minpro.evaluation.tables import Table, average_curves_table, curves_table, markdown_table, scores_table, write_table


def counts(correct: tuple[int, ...], *, samples: int = 4, name: str = "set") -> Counts:
    return Counts(
        benchmark=name,
        title=name.upper(),
        problem_ids=tuple(f"p{number}" for number in range(len(correct))),
        num_samples=(samples,) * len(correct),
        num_correct=correct,
        without_answer=1,
        truncated=2,
        other_endings={},
        without_content=0,
        grading_errors={"timeout": 1},
        num_tokens=40,
    )


def test_both_estimators_for_every_power_of_two_up_to_the_samples() -> None:
    # c = 1 of 4 and 4 of 4. Unbiased: k=2: 1 - C(3,2)/C(4,2) = 1/2; k=4: 1. With replacement: 1 - (3/4)^2 = 7/16; 1 - (3/4)^4 = 175/256.
    table = {(entry.estimator, entry.k): entry.mean for entry in pass_at_k_table(counts((1, 4)))}
    expected = {
        ("unbiased", 1): (1 / 4 + 1) / 2,
        ("unbiased", 2): (1 / 2 + 1) / 2,
        ("unbiased", 4): 1.0,
        ("bootstrap", 1): (1 / 4 + 1) / 2,
        ("bootstrap", 2): (7 / 16 + 1) / 2,
        ("bootstrap", 4): (175 / 256 + 1) / 2,
    }
    assert table.keys() == expected.keys()
    assert [table[key] for key in expected] == pytest.approx(list(expected.values()))
    assert counts((1,), samples=128).ks == [1, 2, 4, 8, 16, 32, 64, 128]
    assert counts((1,), samples=300).ks[-1] == 128
    assert counts((1,), samples=7).ks == [1, 2, 4]


def test_the_average_weighs_benchmarks_alike_and_adds_their_variances() -> None:
    small, large = counts((0, 4) * 50, name="small"), counts((2,) * 400, name="large")
    average = average_pass_at_1([small, large])
    assert average.mean == pytest.approx(0.5)
    # Only the small set varies: sd of its mean is 0.5 / 10, halved in the average. 10,000 resamples: a few per cent of noise.
    assert average.high - average.low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)
    both = average_pass_at_1([small, replace(small, benchmark="again")])
    assert both.high - both.low == pytest.approx(2 * 1.96 * 0.05 / np.sqrt(2), rel=0.1)  # independent draws, not the same one twice


def test_the_average_over_benchmarks_of_pass_at_k_by_hand() -> None:
    # Unbiased, c of 4. One problem with c = 1: 1/4, 1/2, 1. One with c = 2: 1/2, 1 - 1/6, 1. One with c = 0: 0, 0, 0.
    chosen = [counts((1,), name="one"), counts((2,), name="two"), counts((0,), samples=8, name="none")]
    unbiased, bootstrap = average_curves(chosen)
    assert (unbiased.estimator, bootstrap.estimator) == ("unbiased", "bootstrap")
    by_hand = [(1 / 4 + 1 / 2) / 3, (1 / 2 + 5 / 6) / 3, 2 / 3]
    assert {k: average.mean for k, average in unbiased.by_k.items()} == pytest.approx(dict(zip((1, 2, 4), by_hand, strict=True)))
    assert unbiased.over_k.mean == pytest.approx(sum(by_hand) / 3)
    # 1 - (1 - c/n)^k: 3/4 and 1/2 to the powers 1, 2, 4.
    by_hand = [(1 / 4 + 1 / 2) / 3, (7 / 16 + 3 / 4) / 3, (175 / 256 + 15 / 16) / 3]
    assert [average.mean for average in bootstrap.by_k.values()] == pytest.approx(by_hand)
    table = average_curves_table("model", ["ONE", "TWO", "NONE"], [unbiased, bootstrap])
    assert [cell.strip() for cell in table.markdown.splitlines()[0].split("|")[1:-1]] == [
        *("benchmarks", "estimator", "pass@1", "pass@2", "pass@4", "Average over k")
    ]
    assert "| mean of ONE, TWO, NONE | unbiased  | 25.0 [25.0, 25.0] | 44.4 [44.4, 44.4] | 66.7 [66.7, 66.7] | 45.4" in table.markdown
    assert len(table.rows) == 2 * 4 and table.rows[3]["measure"] == "Average over k"


def test_table_2_is_made_of_its_three_benchmarks_and_needs_them_all() -> None:
    chosen = [counts((1,), name=name) for name in ("aime25", "math500", "amc23", "aime24")]
    table = table_2("model", chosen)
    assert table is not None and table.rows[0]["benchmarks"] == "AMC23, AIME24, AIME25"
    assert table_2("model", chosen[:3]) is None


def test_the_average_over_k_draws_the_same_problems_for_every_k() -> None:
    """All or nothing of 100 problems: pass@k is the same for every k, so the average over k varies exactly as each of them."""
    curve = average_curves([counts((0, 4) * 50)])[0]
    assert (curve.over_k.low, curve.over_k.high) == pytest.approx((curve.by_k[1].low, curve.by_k[1].high))
    assert curve.over_k.high - curve.over_k.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)


def test_a_paired_difference_is_narrow_and_has_its_sign() -> None:
    first = counts((0, 1, 2, 3) * 25)
    second = counts((1, 2, 3, 4) * 25)
    by_key = {(item.estimator, item.k): item for item in differences(first, second)}
    gain = by_key["unbiased", 1]
    # Every problem gained one sample of four: the paired interval has no width.
    assert (gain.first, gain.second, gain.difference, gain.low, gain.high) == pytest.approx((0.375, 0.625, 0.25, 0.25, 0.25))
    lost = {(item.estimator, item.k): item for item in differences(second, first)}["unbiased", 1]
    assert lost.difference == pytest.approx(-0.25)
    # Other numbers of samples: the unbiased estimator alone may be compared beyond k = 1. 1 of 4 and 1 of 2 at k = 2, with replacement:
    # 7/16 and 3/4, though without bias they are 1/2 and 1.
    unequal = differences(counts((1,) * 100), counts((1,) * 100, samples=2))
    assert [(item.estimator, item.k, item.difference) for item in unequal] == [
        ("unbiased", 1, pytest.approx(0.25)),
        ("unbiased", 2, pytest.approx(0.5)),
        ("bootstrap", 1, pytest.approx(0.25)),
    ]
    assert "+25.0 [+25.0, +25.0] *" in comparison_table([gain], names=("a", "b")).markdown
    none = differences(counts((0, 4) * 8), counts((4, 0) * 8))[0]
    assert none.difference == 0.0 and none.low < 0 < none.high
    assert "*" not in comparison_table([none], names=("a", "b")).markdown


def test_runs_over_other_problems_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"set: the runs answered different problems \(1 are in one alone\)"):
        differences(counts((1, 2)), counts((1, 2, 3)))


def kept(folder: Path, samples: int, grades: int) -> dict[str, Path]:
    response = {"problem_id": "p0", "text": "x", "finish_reason": "length", "num_tokens": 5}
    grade = {"problem_id": "p0", "correct": True, "extracted": None, "plain": None, "math_verify": None, "error": "ValueError: label"}
    files = {"responses": folder / "r.jsonl", "grades": folder / "g.jsonl"}
    files["responses"].write_text("".join(json.dumps({**response, "sample": n}) + "\n" for n in range(samples)))
    files["grades"].write_text("".join(json.dumps({**grade, "sample": n}) + "\n" for n in range(grades)))
    return files


def test_counting_wants_every_sample_graded(tmp_path: Path) -> None:
    problems = [Problem(problem_id="p0", question="?", label="1", relative_tolerance=0, absolute_tolerance=0)]
    found = count("set", "SET", problems, samples=3, **kept(tmp_path, 3, 3))
    assert asdict(found) == {
        **asdict(counts((3,), samples=3)),
        "without_answer": 3,
        "truncated": 3,
        "grading_errors": {"ValueError": 3},
        "num_tokens": 15,
    }
    assert as_json(found)["mean_tokens"] == 5.0
    with pytest.raises(Incomplete, match="set has 2 responses for problem p0, expected 3 for each of 1 problems"):
        count("set", "SET", problems, samples=3, **kept(tmp_path, 2, 2))
    with pytest.raises(Incomplete, match="2 grades for problem p0"):
        count("set", "SET", problems, samples=3, **kept(tmp_path, 3, 2))


def test_endings_that_only_endpoints_know_are_counted_by_name(tmp_path: Path) -> None:
    files = kept(tmp_path, 3, 3)
    lines = [json.loads(line) for line in files["responses"].read_text().split("\n") if line]
    lines[1]["finish_reason"] = "content_filter"
    lines[2].update(finish_reason="stop", without_content=True)
    files["responses"].write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = [Problem(problem_id="p0", question="?", label="1", relative_tolerance=0, absolute_tolerance=0)]
    found = as_json(count("set", "SET", problems, samples=3, **files))
    assert (found["truncated"], found["other_endings"], found["without_content"]) == (1, {"content_filter": 1}, 1)


def test_tables_say_the_same_in_every_format(tmp_path: Path) -> None:
    chosen = [counts((1, 4), name="one"), counts((0, 0), samples=2, name="two")]
    scores = scores_table("model", chosen, average_pass_at_1(chosen))
    curves = curves_table("model", chosen)
    assert [row["benchmark"] for row in scores.rows] == ["ONE", "TWO", "Average"]
    assert "ONE (avg@4)" in scores.markdown and "62.5 [25.0, 100.0]" in scores.markdown and "31.2" in scores.markdown
    lines = curves.markdown.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["ONE", "ONE", "TWO", "TWO"]
    assert lines[4].rstrip(" |").endswith("0.0 [0.0, 0.0]") and lines[4].count("[") == 2  # two samples: no pass@4
    for name, table in (("scores", scores), ("curves", curves)):
        write_table(tmp_path, name, table)
        assert json.loads((tmp_path / f"{name}.json").read_text()) == table.rows
        with (tmp_path / f"{name}.csv").open() as file:
            assert [float(row["mean"]) for row in csv.DictReader(file)] == [row["mean"] for row in table.rows]
    write_table(tmp_path, "empty", Table(rows=[], markdown=markdown_table(["a"], [])))
    assert (tmp_path / "empty.csv").read_text() == ""


def test_cells_with_bars_do_not_break_a_markdown_table() -> None:
    assert markdown_table(["answer"], [["|x|"]]).splitlines()[2] == "| \\|x\\|  |"


def test_the_picture_is_drawn_for_one_and_for_several_runs(tmp_path: Path) -> None:
    plot_curves(tmp_path / "one.png", {"a": [counts((1, 4), name=str(number)) for number in range(5)]})
    plot_curves(tmp_path / "two.png", {"a": [counts((1, 4))], "b": [counts((2, 2))]})
    for name in ("one", "two"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
