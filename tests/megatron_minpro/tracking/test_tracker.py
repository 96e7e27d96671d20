"""metrics.jsonl and the trackers: what each is told, and how a tracker is found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_minpro.config import TrackerConfig
from megatron_minpro.tracking.late_files import LateFiles
from megatron_minpro.tracking.metrics_file import MetricsFile
from megatron_minpro.tracking.step_details import Histogram, StepDetails
from megatron_minpro.tracking.tracker import RunTracker, make_tracker

CONFIG = {"name": "tiny", "seed": 3}


def tracker_of(run_dir: Path, *trackers: TrackerConfig) -> RunTracker:
    return RunTracker(MetricsFile(run_dir), [make_tracker(tracker, run_dir) for tracker in trackers], LateFiles(run_dir))


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, TrackerConfig(name="tensorboard"))
    tracker.start(CONFIG)
    tracker.log(0, {"reward/trained": 0.25, "policy/entropy": math.nan})
    tracker.log(1, {"reward/trained": 0.5})
    tracker.finish({})
    assert scalars(tmp_path, "reward/trained") == [(0, 0.25), (1, 0.5)]


DETAILS = StepDetails(
    # bins: x <= -1, ]-1, 0], ]0, 2], x > 2
    histograms={
        "log_ratio": Histogram(edges=[-1.0, 0.0, 2.0], counts=[0.0, 6.0, 2.0, 0.0]),
        "empty": Histogram(edges=[0.0], counts=[0, 0]),
    },
    responses=[
        {
            "prompt": "1 + 2",
            "response": "<script>alert(1)</script>\n# 3" + "x" * 5000,
            "answer": 3,
            "extracted": None,
            "reward": 1.0,
            "advantage": 0.5,
            "num_response_tokens": 7,
            "finish_reason": "stop",
            "policy_version": 12,
        }
    ],
)


def test_tensorboard_shows_histograms_and_responses_as_text(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, TrackerConfig(name="tensorboard"))
    tracker.log(4, {"reward/trained": 0.25})
    assert tracker.takes_details
    tracker.log_details(4, DETAILS)
    tracker.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["histograms"] == ["log_ratio"]
    [event] = events.Histograms("log_ratio")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num) == (4, -1.0, 2.0, 8.0)
    assert (list(value.bucket_limit), list(value.bucket)) == ([0.0, 2.0], [6.0, 2.0])
    assert (value.sum, value.sum_squares) == (-0.5 * 6 + 1 * 2, 0.25 * 6 + 1 * 2)
    [text] = events.Tensors("response/0/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert (text.step, shown.splitlines()[0]) == (4, "reward 1, advantage 0.5, 7 tokens, finished by stop, policy version 12")
    assert "\n    <script>alert(1)</script>\n    # 3xxx" in shown, "a code block: nothing of it is markup"
    assert shown.count("x") == 4000 - len("<script>alert(1)</script>\n# 3") + 1, "and the one of extracted"
    assert " ... and 1,029 characters" in shown


def test_a_resumed_run_hides_the_later_events_of_its_former_attempt(tmp_path: Path) -> None:
    for steps, offset in ((range(4), 0.0), (range(2, 3), 20.0)):
        folder = tmp_path / str(offset)
        tracker = RunTracker(MetricsFile(folder), [make_tracker(TrackerConfig(name="tensorboard"), tmp_path)], LateFiles(folder))
        for step in steps:
            tracker.log(step, {"reward/trained": step + offset})
        tracker.finish({})
    assert scalars(tmp_path, "reward/trained") == [(0, 0.0), (1, 1.0), (2, 22.0)]


def finished_wandb_records(folder: Path) -> list[Any]:
    """All records of a run that has ended. wandb's own process writes them, on a busy machine later than `finish` returns."""
    deadline = time.monotonic() + 60
    while True:
        records = wandb_records(folder)
        kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds:
            return records
        assert time.monotonic() < deadline, kinds
        time.sleep(0.1)


def wandb_records(folder: Path) -> list[Any]:
    """Everything in the one offline file: LevelDB's log format behind a header of 7 bytes (magic and version). The last may be torn."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("offline-run-*/run-*.wandb")
    content, records, data, position, block = path.read_bytes(), [], b"", 7, 1 << 15
    while position < len(content):
        if block - position % block < 7:  # no room for a record's head: the rest of the block is empty
            position += block - position % block
            continue
        if position + 7 > len(content):
            break
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        if position + 7 + length > len(content):
            break
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(data))
            data = b""
    return records


def items(fields: Any) -> dict[str, Any]:
    return {"/".join(field.nested_key) or field.key: json.loads(field.value_json) for field in fields}


def test_wandb_gets_the_same_numbers_without_a_network(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, TrackerConfig.model_validate({"name": "wandb", "mode": "offline", "project": "chains"}))
    tracker.start(CONFIG)
    tracker.log(0, {"reward/trained": 0.25, "policy/entropy": math.inf})
    tracker.log(1, {"reward/trained": 0.5})
    tracker.finish({"reward_last": 0.5})
    records = finished_wandb_records(tmp_path / "wandb")
    rows = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(row["global_step"], row["reward/trained"]) for row in rows] == [(0, 0.25), (1, 0.5)]
    assert "policy/entropy" not in rows[0]
    [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("chains", "tiny")
    assert run.run_id == (tmp_path / "wandb/run_id").read_text(), "a resumed attempt continues this wandb run"
    assert items(run.config.update)["seed"] == 3
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["reward_last"] == 0.5


def test_wandb_gets_histograms_and_responses(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, TrackerConfig.model_validate({"name": "wandb", "mode": "offline"}))
    tracker.start(CONFIG)
    tracker.log(4, {"reward/trained": 0.25})
    assert tracker.takes_details
    tracker.log_details(4, DETAILS)
    tracker.log(5, {"reward/trained": 0.5})
    tracker.log_details(5, replace(DETAILS, responses=[]))
    tracker.finish({})
    records = finished_wandb_records(tmp_path / "wandb")
    rows = [items(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [row["global_step"] for row in rows] == [4, 4, 5, 5], "numbers first"
    drawn = {name: rows[1][f"log_ratio/{name}"] for name in ("_type", "values", "bins")}
    assert drawn == {"_type": "histogram", "values": [6.0, 2.0], "bins": [-1.0, 0.0, 2.0]}
    assert not any(name.startswith("empty") for name in rows[1]) and not any(name.startswith("response") for name in rows[3])
    assert rows[1]["response/0/_type"] == "html-file"
    [file] = (tmp_path / "wandb").glob(f"offline-run-*/files/{rows[1]['response/0/path']}")
    shown = file.read_text()
    assert shown.startswith("<p>reward 1, advantage 0.5, 7 tokens, finished by stop, policy version 12</p>\n<p>prompt:</p><pre")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n# 3xxx" in shown and "x ... and 1,029 characters</pre>" in shown
    assert "<script" not in shown, "nothing of it is markup"


def test_a_histogram_without_a_count_has_no_bounds() -> None:
    with pytest.raises(ValueError, match="without any count"):
        DETAILS.histograms["empty"].filled()


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path)
    tracker.log(0, {"policy/entropy": math.nan, "loss/total": math.inf, "batch/lag_min": 0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "global_step": 0,
        "policy/entropy": None,
        "loss/total": None,
        "batch/lag_min": 0,
    }


def test_an_undeclared_metric_ends_the_run_before_anything_is_written(tmp_path: Path) -> None:
    tracker = tracker_of(tmp_path, TrackerConfig(name="tensorboard"))
    with pytest.raises(ValueError, match=r"^metric 'reward' is not declared"):
        tracker.log(0, {"reward": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_tracker_that_lacks_a_step_is_not_told_its_details(tmp_path: Path) -> None:
    class Full:
        told = 0

        def start(self, config: Mapping[str, Any]) -> None: ...
        def finish(self, summary: Mapping[str, Any]) -> None: ...

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 0:
                raise OSError("no space left")

        def log_details(self, step: int, details: StepDetails) -> None:
            self.told += 1
            raise OSError("no space left")

    full = Full()
    tracker = RunTracker(MetricsFile(tmp_path), [full], LateFiles(tmp_path))
    for step, told in enumerate([0, 1, 2]):
        tracker.log(step, {"reward/trained": 0.5})
        tracker.log_details(step, DETAILS)  # a full disk is no reason to end the run
        assert full.told == told


class Notebook:
    """A tracker of the user's own."""

    def __init__(self, run_dir: Path, *, colour: str) -> None:
        self.notes: list[Any] = [colour]

    def start(self, config: Mapping[str, Any]) -> None:
        self.notes.append(config["name"])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.notes.append((step, dict(metrics)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.notes.append(summary["complete"])


MY_TRACKERS = """
from pathlib import Path

def make(run_dir: Path, *, colour: str = "red"):
    from tests.megatron_minpro.tracking.test_tracker import Notebook
    return Notebook(run_dir, colour=colour)

def none(run_dir):
    return None
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_trackers.py").write_text(MY_TRACKERS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("my_module")
def test_a_tracker_of_the_users_own_is_told_everything(tmp_path: Path) -> None:
    mine = make_tracker(TrackerConfig.model_validate({"name": "my_trackers:make", "colour": "blue"}), tmp_path)
    tracker = RunTracker(MetricsFile(tmp_path / "run"), [mine], LateFiles(tmp_path / "run"))
    tracker.start(CONFIG)
    tracker.log(7, {"reward/trained": 0.5, "policy/entropy": math.nan})
    assert not tracker.takes_details
    tracker.log_details(7, DETAILS)
    tracker.finish({"complete": True})
    assert mine.notes == ["blue", "tiny", (7, {"reward/trained": 0.5}), True]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("my_module")
@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "tensorbord"}, "tracking.trackers = 'tensorbord': unknown; did you mean 'tensorboard'"),
        ({"name": "wandb", "projct": "x"}, "tracking.trackers.projct = 'x': wandb has no such option; did you mean 'project'"),
        ({"name": "wandb", "mode": "dry"}, "tracking.trackers = 'wandb': mode = 'dry': expected online or offline"),
        ({"name": "my_trackers:none"}, "tracking.trackers = 'my_trackers:none': made a NoneType, expected an object with start, log"),
    ],
)
def test_a_tracker_that_cannot_be_made_is_refused_with_the_reason(entry: dict[str, str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        make_tracker(TrackerConfig.model_validate(entry), tmp_path)
    assert str(error.value).startswith(reason)
