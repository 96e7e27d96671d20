from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_minpro.report.page.token_data import token_data
from megatron_minpro.tracking.token_records import CUT_NOT_TOLD, TokenRecords, read_token_records, write_token_records

TEXTS = [list(b"4+5:9;"), list(b"4+5:10;;")]


def read(run_dir: Path, *, budget: int = 1_000_000) -> Any:
    return token_data(run_dir, tokenizer_folders=[run_dir / "policy"], budget=budget)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def expand(changes: list[list[Any]], length: int) -> list[float]:
    """The values that [place, value] pairs stand for."""
    found: list[float] = []
    for (place, value), (end, _) in zip(changes, [*changes[1:], [length, None]], strict=True):
        found += [np.nan if value is None else value] * (end - place)
    return found


def test_every_number_of_the_file_arrives_unchanged(
    tmp_path: Path, record_tokens: Callable[..., Path], byte_tokenizer: Callable[..., Path]
) -> None:
    records = read_token_records(record_tokens(tmp_path, TEXTS))
    byte_tokenizer(folder=tmp_path / "policy")
    found = read(tmp_path)
    assert found.notes == []
    first, second = found.content["responses"]
    begin, end = 3, 8  # the second response's trained tokens
    for name in ("behaviour_logprobs", "logprobs", "cumulative", "weights", "entropy"):
        assert floats(second[name]).tolist() == records.streams[name][begin:end].tolist()
    assert floats(second["engine"]).tolist() == records.streams["engine_logprobs"][begin:end].tolist()
    assert np.float32(expand(second["prefix_min"], end - begin)).tolist() == records.streams["prefix_min"][begin:end].tolist()
    told = records.streams["cut"][begin:end].tolist()
    assert second["cut"] is None or list(base64.b64decode(second["cut"])) == told
    assert (second["held"], second["zeroed"], second["lowest"]) == (
        sum(told),
        0,
        pytest.approx(min(0.0, records.streams["prefix_min"][begin:end].min()), rel=1e-5),
    )
    assert (first["number"], second["number"], second["tokens"], second["mask"]) == (1, 2, 8, [3, 5])
    pieces = np.frombuffer(base64.b64decode(second["pieces"]), dtype="<u2")
    assert "".join(found.content["pieces"][piece][1] for piece in pieces) == "4+5:10;;"


def test_answers_come_from_the_step_that_sampled(
    tmp_path: Path, record_tokens: Callable[..., Path], log_rollouts: Callable[..., None]
) -> None:
    record_tokens(tmp_path, TEXTS, step=5, sample_ids=["a", "b"])
    lines = [{"sample_id": "b", "answer": 9, "extracted": "10", "error": None}, {"sample_id": "c", "answer": 1}]
    log_rollouts(tmp_path, 3, lines)
    first, second = read(tmp_path).content["responses"]
    assert (second["answer"], second["extracted"]) == ("9", "10")
    assert not {"answer", "extracted", "error"} & first.keys() and "error" not in second


def test_what_an_objective_does_not_say_is_null(tmp_path: Path, record_tokens: Callable[..., Path]) -> None:
    records = read_token_records(record_tokens(tmp_path, TEXTS))
    silent = {name: np.full_like(records.streams[name], np.nan) for name in ("prefix_min", "cumulative")}
    silent["cut"] = np.full_like(records.streams["cut"], CUT_NOT_TOLD)
    parts = {name: getattr(records, name) for name in TokenRecords.__dataclass_fields__ if name != "streams"}
    write_token_records(tmp_path, TokenRecords(**parts, streams={**records.streams, **silent}))
    response = read(tmp_path).content["responses"][0]
    assert (response["prefix_min"], response["lowest"], response["held"], response["zeroed"]) == ([[0, None]], None, 0, 0)


def test_steps_that_do_not_fit_are_counted(tmp_path: Path, record_tokens: Callable[..., Path]) -> None:
    for step in range(2, 7):
        record_tokens(tmp_path, TEXTS, step=step)
    found = read(tmp_path, budget=5000)
    assert [file["step"] for file in found.content["files"]] == [2, 4, 6]
    said = "6 of 10 recorded responses are in this page, of 3 of 5 steps; the others are in tokens/ and would make it too large"
    assert said in found.notes


def test_what_is_missing_or_damaged_is_one_line(tmp_path: Path, record_tokens: Callable[..., Path]) -> None:
    assert read(tmp_path).content is None
    assert read(tmp_path).notes[0].startswith("tokens/: no token was recorded")
    record_tokens(tmp_path, TEXTS)
    (tmp_path / "tokens/step_000001_update_0000.safetensors").write_bytes(b"torn")
    found = read(tmp_path)
    assert len(found.content["responses"]) == 2
    assert found.notes == [
        "tokens/step_000001_update_0000.safetensors: cannot be read as token records; 1 such files are left out",
        "no tokenizer.json in the run's policy/ nor in model.path; tokens are shown by their ids",
    ]
    assert found.content["pieces"][0] == [ord("4"), "52 ", 0]
