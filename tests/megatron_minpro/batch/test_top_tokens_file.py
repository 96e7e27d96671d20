"""The file of a batch's most likely tokens: what servers returned comes out, in the samples' order, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.batch.top_tokens_file import TopTokensAppender, TopTokensFile

VOCAB_SIZE = 50


def rows(number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Answer `number`: its tokens have the ids number, number + 1, number + 2, and probabilities 1 / 2, 1 / 4 and 1 / (8 + position)."""
    ids = np.tile(np.arange(3, dtype=np.int32) + number, (length, 1))
    logprobs = -np.log(np.array([[2, 4, 8 + t] for t in range(length)], dtype=np.float32))
    return ids, logprobs


def appender(folder: Path, *, top_k: int = 3) -> TopTokensAppender:
    return TopTokensAppender(folder, top_k=top_k, vocab_size=VOCAB_SIZE, step=12)


def test_answers_that_arrive_in_any_order_are_read_in_that_of_the_samples(tmp_path: Path) -> None:
    new = appender(tmp_path)
    lengths = [4, 7, 2, *range(1, 30)]
    with ThreadPoolExecutor(4) as threads:
        kept = [threads.submit(new.keep, *rows(number, length)) for number, length in enumerate(lengths)]
    places = [one.result() for one in kept]
    assert new.metrics()["centering/top_mass_min"] == pytest.approx(0.75 + 1 / 36)
    by_hand = sum(0.75 + 1 / (8 + t) for length in lengths for t in range(length)) / sum(lengths)
    assert new.metrics()["centering/top_mass"] == pytest.approx(by_hand)
    file = new.close([places[2], places[0]])
    assert file.path == "top_tokens/step_000012.top" and file.num_bytes == sum(lengths) * 3 * 8 == (tmp_path / file.path).stat().st_size
    for number, found in zip((2, 0), file.rows(tmp_path, [2, 4]), strict=True):
        ids, logprobs = rows(number, lengths[number])
        assert found.ids.tolist() == ids.tolist() and found.logprobs.tolist() == logprobs.tolist()
    with pytest.raises(ValueError, match="nobody waits for"):
        new.keep(*rows(0, 1))
    # By hand: the ids of answer 2 stand in front of its log-probs.
    raw = (tmp_path / file.path).read_bytes()[places[2] :]
    assert [int.from_bytes(raw[at : at + 4], "little") for at in range(0, 24, 4)] == [2, 3, 4, 2, 3, 4]
    assert np.frombuffer(raw[24:28], "<f4")[0] == pytest.approx(-math.log(2))


def test_a_conversation_has_the_rows_of_all_its_answers(tmp_path: Path) -> None:
    new = appender(tmp_path)
    first, second = new.keep(*rows(5, 2)), new.keep(*rows(9, 3))
    assert new.joined([(second, 3)]) == second
    [both] = new.close([new.joined([(second, 3), (first, 2)])]).rows(tmp_path, [5])
    assert both.ids[:, 0].tolist() == [9, 9, 9, 5, 5]
    expected = np.concatenate([rows(9, 3)[1], rows(5, 2)[1]])
    assert both.logprobs.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([0, VOCAB_SIZE], [-1.0, -1.0], "top tokens have ids from 0 to 50, expected 0 to 49"),
        ([-1, 2], [-1.0, -1.0], "top tokens have ids from -1 to 2, expected 0 to 49"),
        ([1, 2], [-0.1, -0.5], "top tokens have the probability 1.51137 together, expected at most 1"),
        ([1, 2], [-1.0, math.nan], "top tokens have the probability nan together"),
    ],
)
def test_rows_that_are_no_distribution_are_refused(ids: list[int], logprobs: list[float], message: str, tmp_path: Path) -> None:
    new = appender(tmp_path, top_k=2)
    with pytest.raises(ValueError, match=message):
        new.keep(np.array([[1, 2], ids], dtype=np.int32), np.array([[-1.0, -2.0], logprobs], dtype=np.float32))
    new.keep(np.array([[1, 2]], dtype=np.int32), np.array([[0.0, np.finfo(np.float32).min]], dtype=np.float32))  # one underflowed
    assert new.close([]).num_bytes == 16


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    file = TopTokensFile(name="step_000003.top", top_k=2, offsets=(0,), num_bytes=16)
    (tmp_path / "top_tokens").mkdir()
    (tmp_path / file.path).write_bytes(b"0" * 15)
    with pytest.raises(ValueError, match=r"step_000003.top: has 15 bytes, expected 16, the 2 most likely tokens of 1 responses"):
        file.rows(tmp_path, [1])


def test_the_place_travels_with_the_batch_and_the_rows_do_not(make_batch: Callable[..., RolloutBatch]) -> None:
    file = TopTokensFile(name="step_000003.top", top_k=2, offsets=(0, 64, 128, 192), num_bytes=256)
    record, streams = batch_streams.pack(replace(make_batch(3), top_tokens=file))
    found = batch_streams.unpack(json.loads(json.dumps(record)), streams)
    assert found.top_tokens == file and found.files == ["top_tokens/step_000003.top"]
    assert "top_tokens" not in batch_streams.pack(make_batch(3)).record and not any("top" in name for name in streams)


def test_rows_go_with_the_sequence_that_is_trained(make_batch: Callable[..., RolloutBatch], tmp_path: Path) -> None:
    sample = make_batch(3).scored_by_engine().samples[0]
    new = appender(tmp_path)
    [top] = new.close([new.keep(*rows(1, sample.num_response_tokens))]).rows(tmp_path, [sample.num_response_tokens])
    sequence = sample.training_sequence(top=top)
    assert sequence.top is top and int(sequence.loss_mask.sum()) == top.num_rows
    with pytest.raises(ValueError, match=rf"top: {top.num_rows - 1} rows, expected {top.num_rows}, one for each True of loss_mask"):
        sample.training_sequence(top=replace(top, ids=top.ids[1:], logprobs=top.logprobs[1:]))
    with pytest.raises(ValueError, match=r"top ids: torch.int64 \[.*\], expected torch.int32"):
        replace(top, ids=torch.zeros(2, 3, dtype=torch.int64))
