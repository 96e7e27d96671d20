"""Which folders a path inside a run stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_convert.checkpoint_location import locate_checkpoint, weights_folder


def make_run(root: Path, *, output_dir: str = "runs") -> Path:
    """A run started in `root` with relative paths, as run_state.save leaves it."""
    step = root / "runs/name/checkpoints/step_000004"
    (step / "actor").mkdir(parents=True)
    (step.parent / "latest").write_text("step_000004")
    config = {"model": {"path": "models/base"}, "output_dir": output_dir, "name": "name"}
    (step / "run.json").write_text(json.dumps({"config": config}))
    (root / "models/base").mkdir(parents=True)
    (root / "models/base/config.json").write_text("{}")
    return root / "runs/name"


@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/latest", "checkpoints/step_000004", "checkpoints/step_000004/actor"])
def test_every_path_inside_a_run_leads_to_its_weights_and_model(path: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = locate_checkpoint(run / path)
    assert found.weights == run / "checkpoints/step_000004/actor"
    assert found.model == tmp_path / "models/base"  # from where the run was started, wherever we are
    assert locate_checkpoint(run / path, config=tmp_path).model == tmp_path


def test_an_absolute_output_folder_leaves_relative_models_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, output_dir=str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint(run).model.resolve() == tmp_path / "models/base"


def test_any_other_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    found = locate_checkpoint(tmp_path)
    assert (found.weights, found.model) == (tmp_path, tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        locate_checkpoint(tmp_path / "nowhere")
    run = make_run(tmp_path)
    (tmp_path / "models/base/config.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json: the run started from models/base, which is not there"):
        locate_checkpoint(run)
    assert weights_folder(run).name == "actor"
    (run / "checkpoints/step_000004/run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json: names no model"):
        locate_checkpoint(run)
    (run / "checkpoints/latest").write_text("step_000009")
    with pytest.raises(ValueError, match=r"latest: names 'step_000009'"):
        locate_checkpoint(run)
