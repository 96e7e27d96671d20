"""A batch in transit: the same numbers on the other side, few bytes, no Python numbers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from megatron_minpro.batch import streams as batch_streams
from megatron_minpro.batch.sample import RolloutBatch
from rollout.records import VersionSpan
from tests.megatron_minpro.conftest import content

MakeBatch = Callable[..., RolloutBatch]


def _rank(rank: int, batch: RolloutBatch, rendezvous: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    assert torch.distributed.group.WORLD is not None
    found = batch_streams.broadcast(batch_streams.pack(batch) if rank == 0 else None, group=torch.distributed.group.WORLD)
    if rank == 1:
        record, streams = batch_streams.pack(found)
        torch.save((record, streams), out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.ranks
def test_the_other_rank_receives_every_bit(make_batch: MakeBatch, make_sample: Callable, tmp_path) -> None:  # type: ignore[no-untyped-def]
    samples = tuple(make_sample(n, response=n + 1, version=5, behaviour_logprobs=None) for n in range(4))
    batch = replace(make_batch(3, version=5), samples=samples)
    mp.spawn(_rank, (batch, str(tmp_path / "meet"), str(tmp_path / "out")), nprocs=2)
    record, streams = torch.load(tmp_path / "out")
    # By hand: sample n has prompt 0, 1, 2 and response 10 n, ..., 11 n; log-probs -0.1 (t + 1) - n.
    assert streams["token_ids"].tolist() == [0, 1, 2, 0, 0, 1, 2, 10, 11, 0, 1, 2, 20, 21, 22, 0, 1, 2, 30, 31, 32, 33]
    expected = np.array([-0.1 * (t + 1) - n for n in range(4) for t in range(n + 1)], dtype=np.float32)
    assert streams["engine_logprobs"].numpy().tobytes() == expected.tobytes()
    assert streams["loss_mask"].tolist() == [flag for n in range(4) for flag in [False] * 3 + [True] * (n + 1)]
    assert sorted(streams) == ["engine_logprobs", "loss_mask", "token_ids"]
    assert record["samples"][2]["version_spans"] == [{"policy_version": 5, "start": 0, "end": 3}]
    assert (record["sampled_at_step"], record["policy_version"], record["group_size"]) == (3, 5, 2)
    assert [fields["sample_id"] for fields in record["samples"]] == [f"sample-{n}" for n in range(4)]
    assert [fields["advantage"] for fields in record["samples"]] == [0.1 * n for n in range(4)]


def test_a_scored_batch_costs_thirteen_bytes_a_response_token(make_batch: MakeBatch, make_sample: Callable) -> None:
    samples = tuple(make_sample(n, response=5000) for n in range(2))
    record, streams = batch_streams.pack(replace(make_batch(0), samples=samples))
    assert sum(stream.nbytes for stream in streams.values()) == 2 * (5000 * 13 + 3 * 5)
    assert len(pickle.dumps(record)) < 1000, "no token is in the record"


def test_streams_of_another_length_are_refused(make_batch: MakeBatch) -> None:
    record, streams = batch_streams.pack(make_batch(0))
    with pytest.raises(ValueError, match=r"^engine_logprobs: 7 tokens, expected 8$"):
        batch_streams.unpack(record, {**streams, "engine_logprobs": streams["engine_logprobs"][:-1]})


def test_a_conversation_of_several_turns_arrives_as_it_was(make_batch: MakeBatch, make_sample: Callable) -> None:
    spans = tuple(VersionSpan(policy_version=0, start=start, end=end) for start, end in ((0, 2), (2, 3)))
    masks = [(False, True, True, False, True, False), (False, False, True, False, False, True, True)]
    samples = tuple(
        make_sample(n, token_ids=tuple(range(len(mask))), loss_mask=mask, response=3, version_spans=spans) for n, mask in enumerate(masks)
    )
    batch = replace(make_batch(0), samples=samples)
    record, streams = batch_streams.pack(batch)
    assert content([batch_streams.unpack(json.loads(json.dumps(record)), streams)]) == content([batch])


def test_a_stream_that_some_samples_lack_is_refused(make_batch: MakeBatch) -> None:
    batch = make_batch(0)
    unscored = replace(batch, samples=(*batch.samples[:-1], replace(batch.samples[-1], behaviour_logprobs=None)))
    with pytest.raises(ValueError, match=r"^sample-3: behaviour_logprobs must be there for all samples of a batch or for none$"):
        batch_streams.pack(unscored)
