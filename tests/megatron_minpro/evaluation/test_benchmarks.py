"""The seven sets as they are declared, against the real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.evaluation.benchmarks import BENCHMARKS, choose_benchmarks, locate
from megatron_minpro.evaluation.problems import load_problems, read_problems, write_problems
from megatron_minpro.evaluation.request import BenchmarkChoice

ROWS = {"amc23": 40, "aime24": 30, "aime25": 30, "math500": 500, "olympiadbench": 675, "minerva_math": 272, "gsm8k": 1319}


def choose(*names: str, **changed: Any) -> list[Any]:
    return choose_benchmarks(BenchmarkChoice(benchmarks=names, **changed))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_real_set_is_a_problem_with_label_and_own_id(name: str, assets: Path) -> None:
    problems = read_problems(BENCHMARKS[name], data=assets, limit=None)
    assert len(problems) == ROWS[name] == len({problem.problem_id for problem in problems})
    assert all(problem.question.strip() and problem.label for problem in problems)
    assert BENCHMARKS[name].num_samples == (128 if name in ("amc23", "aime24", "aime25") else 2)


def test_labels_of_the_real_sets_are_read_from_where_they_stand(assets: Path) -> None:
    def labels(name: str) -> list[str]:
        return [problem.label for problem in read_problems(BENCHMARKS[name], data=assets, limit=None)]

    assert labels("amc23")[:4] == ["27", "36", "45", "3159"]  # stored as 27.0
    assert labels("aime24")[7] == "025"
    assert labels("aime25")[19] == "336"
    assert labels("minerva_math")[1] == "4.5e33" and labels("minerva_math")[5] == "\\arcsin(10/13)"
    assert labels("olympiadbench")[13] == "$69$,$84$" and labels("olympiadbench")[96] == "(0,4]"
    assert labels("gsm8k")[2] == "70000" and not any("," in label or "<<" in label for label in labels("gsm8k"))


def test_tolerances_come_from_the_set_and_from_the_row(assets: Path) -> None:
    olympiad = read_problems(BENCHMARKS["olympiadbench"], data=assets, limit=None)
    assert {problem.label: problem.absolute_tolerance for problem in olympiad if problem.absolute_tolerance} == {"4.2": 0.1}
    assert {problem.relative_tolerance for problem in olympiad} == {0.0}
    assert {problem.relative_tolerance for problem in read_problems(BENCHMARKS["minerva_math"], data=assets, limit=None)} == {0.01}


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.label_corrections])
def test_every_corrected_label_is_in_the_real_set(name: str, assets: Path) -> None:
    text = (assets / f"data/eval/{name}/test.jsonl").read_text()
    for stored in BENCHMARKS[name].label_corrections:
        assert json.dumps(stored)[1:-1] in text


def test_files_are_found_in_either_layout(tmp_path: Path) -> None:
    places = [tmp_path / "a/aime24/test.jsonl", tmp_path / "b/data/eval/aime24/test.jsonl", tmp_path / "c/aime24.jsonl"]
    for place in places:
        place.parent.mkdir(parents=True)
        place.write_text("{}\n")
    assert [locate(BENCHMARKS["aime24"], tmp_path / name) for name in "abc"] == [(str(place), {}) for place in places]
    with pytest.raises(ValueError, match=r"no math500; looked for math500/test\.jsonl, data/eval"):
        locate(BENCHMARKS["math500"], tmp_path / "a")
    assert locate(BENCHMARKS["math500"], None) == ("HuggingFaceH4/MATH-500", {"split": "test"})
    assert locate(BENCHMARKS["gsm8k"], None) == ("openai/gsm8k", {"split": "test", "name": "main"})
    with pytest.raises(ValueError, match="amc23: --data DIR"):
        locate(BENCHMARKS["amc23"], None)


def test_names_files_and_data_sets_can_be_mixed() -> None:
    chosen = choose("AIME24", "minerva", "some/where/My Set.jsonl", "owner/name", split="train")
    assert [benchmark.name for benchmark in chosen] == ["aime24", "minerva_math", "My_Set", "owner_name"]
    assert locate(chosen[2], None) == ("some/where/My Set.jsonl", {})
    assert locate(chosen[3], None) == ("owner/name", {"split": "train"})


@pytest.mark.parametrize(
    ("names", "changed", "message"),
    [
        (("amie24",), {}, "'amie24' is unknown; did you mean 'aime24'"),
        (("aime24", "AIME24"), {}, "aime24 is named twice"),
        ((), {}, "nothing is named"),
        (("aime24",), {"answer_format": "after_hash"}, "did you mean 'after_hashes'"),
    ],
)
def test_wrong_names_are_refused(names: tuple[str, ...], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*names, **changed)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "field 'question' is missing"),
        ({"question": " ", "answer": "1"}, "field 'question' holds no question"),
        ({"question": "x", "answer": ""}, "field 'answer' holds no answer"),
        ({"question": "x", "answer": ["1"]}, "is a list, expected text or a number"),
    ],
)
def test_a_row_without_question_or_answer_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "1+1", "answer": 2}) + "\n" + json.dumps(row) + "\n")
    (benchmark,) = choose(str(path))
    with pytest.raises(ValueError, match=rf"own\.jsonl: line 2.*{message}"):
        read_problems(benchmark, data=None, limit=None)
    assert [problem.label for problem in read_problems(benchmark, data=None, limit=1)] == ["2"]


def test_a_system_message_before_the_question_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path.write_text(json.dumps({"messages": messages, "answer": "2"}) + "\n")
    (benchmark,) = choose(str(path), question_field="messages.1.content")
    [problem] = problems = read_problems(benchmark, data=None, limit=None)
    assert (problem.question, problem.preceding) == ("1 + 1?", (messages[0],))
    write_problems(tmp_path / "kept.jsonl", problems)
    assert load_problems(tmp_path / "kept.jsonl") == problems


def test_equal_questions_stay_two_problems_and_files_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    question = "1 +\u2028 1\u2029\u0085\x0b\x0c\x1c\r = ?"  # what str.splitlines takes for ends of lines
    path.write_text(2 * (json.dumps({"question": question, "answer": "zwei \u2603"}) + "\n"))
    (benchmark,) = choose(str(path))
    problems = read_problems(benchmark, data=None, limit=None)
    assert len({problem.problem_id for problem in problems}) == 2
    write_problems(tmp_path / "kept.jsonl", problems)
    assert load_problems(tmp_path / "kept.jsonl") == problems
    (tmp_path / "kept.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is not a problem"):
        load_problems(tmp_path / "kept.jsonl")


def test_half_of_a_surrogate_pair_names_file_row_and_field(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "1", "answer": "1"}\n{"question": "smile \\ud83d", "answer": "1"}\n')
    (benchmark,) = choose(str(path))
    with pytest.raises(ValueError, match=r"own\.jsonl: line 2: field 'question' holds U\+D83D alone at character 6"):
        read_problems(benchmark, data=None, limit=None)


@pytest.mark.parametrize("given", ["much", -1, "inf"])
def test_a_strange_tolerance_in_a_row_is_refused(given: Any, tmp_path: Path) -> None:
    (tmp_path / "olympiadbench.jsonl").write_text(json.dumps({"question": "x", "final_answer": ["1"], "error": given}) + "\n")
    with pytest.raises(ValueError, match="field 'error' is"):
        read_problems(BENCHMARKS["olympiadbench"], data=tmp_path, limit=None)
