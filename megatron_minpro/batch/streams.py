"""A batch as a few tensors and one small record: how it goes into a checkpoint and from rank 0 to all ranks.

The per-token streams of all samples are joined end to end, one tensor per stream, so that nothing is kept or sent as Python numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_minpro.batch.routing_file import RoutingFile
from megatron_minpro.batch.sample import SEQUENCE_STREAMS, STREAMS, RolloutBatch, Sample
from megatron_minpro.batch.top_tokens_file import TopTokensFile
from rollout.records import VersionSpan

_SCALARS = tuple(field.name for field in fields(Sample) if field.name not in (*STREAMS, "version_spans"))


class PackedBatch(NamedTuple):
    """A batch in transit."""

    record: dict[str, Any]  # JSON's types
    streams: dict[str, Tensor]  # of all samples, end to end


def pack(batch: RolloutBatch) -> PackedBatch:
    """The record (JSON's types) and the joined streams: token_ids and loss_mask [all tokens], the others [all response tokens].

    A stream that the batch does not have yet, or not at all, is absent. Raises ValueError naming a sample that has one which others lack.
    """
    present = [name for name in STREAMS if getattr(batch.samples[0], name) is not None]
    for sample in batch.samples:
        for name in STREAMS:
            if (getattr(sample, name) is not None) != (name in present):
                raise ValueError(f"{sample.sample_id}: {name} must be there for all samples of a batch or for none")
    record = {
        "sampled_at_step": batch.sampled_at_step,
        "policy_version": batch.policy_version,
        "group_size": batch.group_size,
        "streams": present,
        "samples": [_record(sample) for sample in batch.samples],
    }
    if batch.routing is not None:
        record["routing"] = asdict(batch.routing)
    if batch.top_tokens is not None:
        record["top_tokens"] = asdict(batch.top_tokens)
    return PackedBatch(record, {name: torch.cat([getattr(sample, name) for sample in batch.samples]) for name in present})


def _record(sample: Sample) -> dict[str, Any]:
    return {
        **{name: getattr(sample, name) for name in _SCALARS},
        "version_spans": [asdict(span) for span in sample.version_spans],
        "num_tokens": len(sample.token_ids),
        "num_response_tokens": sample.num_response_tokens,
    }


def _lengths(record: Mapping[str, Any], stream: str) -> list[int]:
    key = "num_tokens" if stream in SEQUENCE_STREAMS else "num_response_tokens"
    return [fields[key] for fields in record["samples"]]


def unpack(record: Mapping[str, Any], streams: Mapping[str, Tensor]) -> RolloutBatch:
    """The counterpart of `pack`; the samples' tensors are views of `streams`. Raises ValueError for streams of another length."""
    samples = record["samples"]
    parts: dict[str, Any] = {}
    for name in record["streams"]:
        lengths = _lengths(record, name)
        if len(streams[name]) != sum(lengths):
            raise ValueError(f"{name}: {len(streams[name])} tokens, expected {sum(lengths)}")
        parts[name] = streams[name].split(lengths)

    def sample(number: int) -> Sample:
        values = {name: samples[number][name] for name in _SCALARS}
        values["version_spans"] = tuple(VersionSpan(**span) for span in samples[number]["version_spans"])
        values |= {name: parts[name][number] if name in parts else None for name in STREAMS}
        return Sample(**values)

    return RolloutBatch(
        sampled_at_step=record["sampled_at_step"],
        policy_version=record["policy_version"],
        group_size=record["group_size"],
        samples=tuple(map(sample, range(len(samples)))),
        routing=RoutingFile.from_record(record["routing"]) if "routing" in record else None,
        top_tokens=TopTokensFile.from_record(record["top_tokens"]) if "top_tokens" in record else None,
    )


def broadcast(packed: PackedBatch | None, *, group: dist.ProcessGroup) -> RolloutBatch:
    """Collective over `group` (gloo). Rank 0's batch on every rank; the others give None."""
    box = [None if packed is None else packed.record]
    dist.broadcast_object_list(box, src=0, group=group)
    record = box[0]
    assert record is not None, "rank 0 gives the batch"
    if packed is None:
        streams = {name: torch.empty(sum(_lengths(record, name)), dtype=STREAMS[name]) for name in record["streams"]}
    else:
        streams = packed.streams
    for name in record["streams"]:
        dist.broadcast(streams[name], src=0, group=group)
    return unpack(record, streams)
