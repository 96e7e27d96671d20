"""Run folders that are whole, under way, damaged, older or of another project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.report.runs import read_run
from megatron_minpro.tracking.versions import append_versions


def test_a_complete_run_is_read_whole(write_run: Callable[..., Path]) -> None:
    folder = write_run("a", "seed=3")
    (folder / "seconds.json").write_text(json.dumps({"train_and_servers": 90.0, "update": 5.0}))
    (folder / "summary.json").write_text(json.dumps({"reward_last": 0.5}))
    view = read_run(folder)
    assert (view.name, view.seed, view.state, list(view.notes)) == ("a", 3, "complete", [])
    assert view.config == load_config(folder / "config.yaml")
    assert view.settings["rollout.group_size"] == view.config.rollout.group_size
    assert [line.get("reward/trained") for line in view.metrics] == [None, 0.25, 0.5]
    assert [(label, content["pass_at_1"]) for label, content in view.evaluations.items()] == [
        ("before", 0.25),
        ("step_000002", 0.5),
        ("after", 0.375),
    ]
    assert view.seconds == {"update": 5.0, "train_and_servers": 90.0}, "all attempts before the last one"
    assert view.summary == {"reward_last": 0.5}


def test_versions_that_cannot_be_read_are_a_note(write_run: Callable[..., Path]) -> None:
    folder = write_run("a")
    append_versions(folder, global_step=0, versions={"torch": "1"})
    [attempt] = read_run(folder).attempts
    assert attempt.versions == {"torch": "1"}
    (folder / "versions.jsonl").write_text('{"global_step": 0}\n')
    view = read_run(folder)
    assert list(view.attempts) == []
    assert list(view.notes) == ["versions.jsonl:1: expected the versions of an attempt (KeyError: 'versions')"]


def test_a_run_under_way_has_no_result_yet(write_run: Callable[..., Path]) -> None:
    folder = write_run("a", complete=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 3, "reward/tr')
    view = read_run(folder)
    assert (view.state, view.result, view.summary, len(view.metrics)) == ("running or killed", None, None, 3)
    assert list(view.notes) == ["metrics.jsonl:4: the last line is unfinished and is left out"]
    assert read_run(write_run("b", complete=False)).state == "stopped"


def test_a_run_before_its_first_step_says_so(write_run: Callable[..., Path]) -> None:
    folder = write_run("a", complete=None)
    (folder / "metrics.jsonl").unlink()
    view = read_run(folder)
    assert (list(view.metrics), list(view.notes)) == ([], ["metrics.jsonl: missing; no step has ended"])


def test_settings_of_an_older_run_are_known_without_its_config(write_run: Callable[..., Path]) -> None:
    folder = write_run("a", "seed=3")
    with (folder / "config.yaml").open("a") as file:
        file.write("old_key: {inner: 5}\n")
    view = read_run(folder)
    assert view.config is None
    assert (view.name, view.seed, view.settings["old_key.inner"], view.settings["objective.name"]) == ("a", 3, 5, "minpro")
    (note,) = view.notes
    assert note.startswith("config.yaml: of another version or project: ") and "unknown key old_key" in note and "\n" not in note


@pytest.mark.parametrize(
    ("file", "content", "note"),
    [
        ("metrics.jsonl", 'nonsense\n{"step": 1, "loss": 2.0}\n{"global_step": 5, "a": NaN, "b": "x", "c": 1}\n', "metrics.jsonl:1: "),
        ("result.json", "{", "result.json: expected a JSON object ("),
        ("summary.json", "[1]", "summary.json: expected a JSON object, found a list"),
        ("evaluation_after.json", "\0", "evaluation_after.json: expected a JSON object ("),
        ("config.yaml", "just words\n", "config.yaml: of another version or project: "),
    ],
)
def test_a_damaged_file_is_one_line_and_the_rest_is_read(file: str, content: str, note: str, write_run: Callable[..., Path]) -> None:
    folder = write_run("a")
    (folder / file).write_text(content)
    view = read_run(folder)
    assert len(view.notes) == 1 and view.notes[0].startswith(note) and str(folder) not in view.notes[0]
    if file == "metrics.jsonl":
        assert list(view.metrics) == [{"global_step": 5, "a": None, "c": 1}]
        assert view.notes[0].endswith("2 such lines are left out")
    else:
        assert len(view.metrics) == 3


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}: holds neither config\.yaml nor metrics\.jsonl; expected the folder of a run$"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="nowhere: holds neither"):
        read_run(tmp_path / "nowhere")
