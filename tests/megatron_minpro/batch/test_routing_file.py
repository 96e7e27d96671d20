"""The file of a batch's chosen experts: what its writers put in comes out, in place, and nothing else is taken for rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.routing_file import RoutingAppender, RoutingFile
from megatron_minpro.batch.sample import RolloutBatch
from parallel.expert_rows import check_rows, is_missing, rows_of

SHAPE = {
    **{"model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 64},
}
LENGTHS = [4, 7, 2]


def model(num_experts: int) -> Architecture:
    return Architecture.from_config({**SHAPE, "num_experts": num_experts}, source="test")


@pytest.mark.parametrize(("num_experts", "id_bytes"), [(4, 1), (254, 1), (255, 2), (512, 2)])
def test_rows_that_several_writers_wrote_in_parts_come_back(num_experts: int, id_bytes: int, tmp_path: Path) -> None:
    file = RoutingFile.of(model(num_experts), step=12, lengths=LENGTHS)
    assert file.offsets == tuple(3 * 2 * id_bytes * before for before in (0, 4, 11)) and file.num_bytes == 3 * 2 * id_bytes * 13
    last = num_experts - 1
    expected = [torch.stack([torch.full((3, length), last), torch.arange(length).expand(3, length) % 3], -1) for length in LENGTHS]
    file.create(tmp_path / "routing")
    for layers in ((0, 1), (2,)):  # as two pipeline stages, each with two parts of a sequence
        with file.writer(tmp_path / "routing", LENGTHS) as writer:
            for index, rows in enumerate(expected):
                for layer in layers:
                    cut = len(rows[layer]) // 2
                    writer.write(index, layer, cut, rows[layer, cut:].to(file.dtype))
                    writer.write(index, layer, 0, rows[layer, :cut].to(file.dtype))
    assert (tmp_path / "routing/step_000012.rows").stat().st_size == file.num_bytes
    found = file.rows(tmp_path / "routing", LENGTHS)
    assert all(torch.equal(rows.long(), given) for rows, given in zip(found, expected, strict=True))
    # By hand: the second sequence's last layer begins behind 4 positions of 3 layers and 7 of 2, two ids each.
    raw = (tmp_path / "routing/step_000012.rows").read_bytes()
    place = (4 * 3 + 7 * 2) * 2 * id_bytes
    assert int.from_bytes(raw[place : place + id_bytes], "little") == last


def test_rows_that_nobody_wrote_are_no_rows(tmp_path: Path) -> None:
    file = RoutingFile.of(model(4), step=0, lengths=LENGTHS)
    file.create(tmp_path)
    with pytest.raises(ValueError, match=r"one: experts \[0, 0\] of layer 0, position 0: expected 2 different ids from 0 to 3 \(12 of 12"):
        check_rows(file.rows(tmp_path, LENGTHS)[0], num_experts=4, source="one")


@pytest.mark.parametrize("row", [[1, 1], [0, 4], [255, 2]])
def test_a_row_that_is_no_set_of_experts_is_refused_by_its_place(row: list[int]) -> None:
    rows = torch.tensor([0, 3], dtype=torch.uint8).repeat(3, 5, 1)
    rows[0] = 255  # missing rows are in order
    check_rows(rows, num_experts=4, source="one")
    rows[2, 4] = torch.tensor(row)
    with pytest.raises(ValueError, match=r"layer 2, position 4: expected 2 different ids from 0 to 3 \(1 of 15 rows"):
        check_rows(rows, num_experts=4, source="one")


def test_a_response_without_a_place_has_missing_rows(tmp_path: Path) -> None:
    whole = RoutingFile.of(model(4), step=0, lengths=LENGTHS)
    file = replace(whole, offsets=(0, None, 3 * 2 * 4), num_bytes=3 * 2 * 6)
    file.create(tmp_path)
    found = file.rows(tmp_path, LENGTHS)
    assert found[1].shape == (3, 7, 2) and is_missing(found[1]).all()
    assert not any(is_missing(found[index]).any() for index in (0, 2))


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    file = RoutingFile.of(model(4), step=3, lengths=LENGTHS)
    (tmp_path / "step_000003.rows").write_bytes(b"\0" * 77)
    with pytest.raises(ValueError, match=r"step_000003.rows: has 77 bytes, expected 78, the chosen experts of 3 responses"):
        file.rows(tmp_path, LENGTHS)


def test_a_new_file_leaves_one_that_a_checkpoint_has_linked(tmp_path: Path) -> None:
    file = RoutingFile.of(model(4), step=3, lengths=LENGTHS)
    (tmp_path / "step_000003.rows").write_bytes(b"kept")
    (tmp_path / "linked").hardlink_to(tmp_path / "step_000003.rows")
    file.create(tmp_path)
    assert (tmp_path / "linked").read_bytes() == b"kept"


def test_the_place_travels_with_the_batch_and_the_rows_do_not(make_batch: Callable[..., RolloutBatch]) -> None:
    file = RoutingFile.of(model(4), step=3, lengths=[4, 4, 4, 4])
    record, streams = batch_streams.pack(replace(make_batch(3), routing=file))
    assert batch_streams.unpack(json.loads(json.dumps(record)), streams).routing == file
    assert "routing" not in batch_streams.pack(make_batch(3)).record
    assert asdict(file)["offsets"] == (0, 24, 48, 72)
    assert sorted(streams) == [
        "behaviour_logprobs",
        "engine_logprobs",
        "loss_mask",
        "token_ids",
    ]


def from_server(num_inputs: int, *, layers: int = 3, first: int = 0) -> bytes:
    """Token t visits in layer l the experts (first + t + l) % 4 and the next one, as SGLang writes it."""
    return b"".join(
        ((first + t + layer + k) % 4).to_bytes(4, "little") for t in range(num_inputs) for layer in range(layers) for k in range(2)
    )


@pytest.mark.parametrize("num_experts", [4, 254, 255, 512])
def test_ids_of_a_server_become_rows_as_in_a_plain_loop(num_experts: int) -> None:
    generator = np.random.default_rng(num_experts)
    ids = np.argsort(generator.random((5, 3, num_experts)), -1)[..., :4].astype(np.int32)
    rows = rows_of(ids, num_experts=num_experts)
    assert rows.dtype == (torch.uint8 if num_experts <= 254 else torch.int16)
    assert rows.tolist() == [[ids[t, layer].tolist() for t in range(5)] for layer in range(3)]


@pytest.mark.parametrize("row", [[1, 1, 2], [2, 0, 2], [0, 1, 4], [-1, 0, 1], [0, 1, 256], [255, 255, 255], [0, 0, 0]])
def test_ids_that_are_no_set_of_experts_are_refused_by_their_place(row: list[int]) -> None:
    ids = np.tile(np.array([3, 0, 1], dtype=np.int32), (5, 2, 1))
    assert rows_of(ids, num_experts=4).shape == (2, 5, 3)
    ids[4, 1] = row
    with pytest.raises(ValueError, match=r"layer 1, position 4: expected 3 different ids from 0 to 3 \(1 of 10 rows"):
        rows_of(ids, num_experts=4)


def test_answers_that_arrive_in_any_order_are_read_in_that_of_the_samples(tmp_path: Path) -> None:
    appender = RoutingAppender(tmp_path, model(4), step=3)
    with ThreadPoolExecutor(4) as threads:
        lengths = [*LENGTHS, *range(1, 30)]
        kept = [threads.submit(appender.keep, from_server(n, first=i), num_inputs=n) for i, n in enumerate(lengths)]
    places = [one.result() for one in kept]
    file = appender.close([places[2], None, places[0]])
    assert file.num_bytes == sum(3 * 2 * n for n in lengths) == (tmp_path / file.name).stat().st_size
    last, unknown, first = file.rows(tmp_path, [2, 5, 4])
    assert is_missing(unknown).all() and unknown.shape == (3, 5, 2)
    for number, rows in ((2, last), (0, first)):
        assert rows.tolist() == [[[(number + t + j + k) % 4 for k in range(2)] for t in range(rows.size(1))] for j in range(3)]
    with pytest.raises(ValueError, match="nobody waits for"):
        appender.keep(from_server(1), num_inputs=1)
    assert (tmp_path / file.name).stat().st_size == file.num_bytes


def test_ids_of_another_model_are_refused(tmp_path: Path) -> None:
    appender = RoutingAppender(tmp_path, model(4), step=3)
    for ids in (from_server(4, layers=2), from_server(5), from_server(4)[:-1], b""):
        with pytest.raises(ValueError, match=rf"^{len(ids)} bytes of experts, expected 96: 4 tokens x 3 layers x 2 experts of 4 bytes$"):
            appender.keep(ids, num_inputs=4)
    assert appender.close([]).num_bytes == 0


def test_a_conversation_keeps_the_experts_that_each_token_visited_first(tmp_path: Path) -> None:
    """Two answers: the second one's inputs begin with the first one's, which the server computed again."""
    appender = RoutingAppender(tmp_path, model(4), step=3)
    first, second = appender.keep(from_server(3), num_inputs=3), appender.keep(from_server(6, first=1), num_inputs=6)
    assert appender.joined([(first, 3)], num_inputs=3) == first
    file = appender.close([appender.joined([(first, 3), (second, 6)], num_inputs=8), appender.joined([(first, 3)], num_inputs=4)])
    both, closed = file.rows(tmp_path, [8, 4])
    assert both[2].tolist() == [[2, 3], [3, 0], [0, 1], [2, 3], [3, 0], [0, 1], [255, 255], [255, 255]]
    assert closed[0].tolist() == [[0, 1], [1, 2], [2, 3], [255, 255]]
