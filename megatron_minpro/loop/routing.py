"""Routing replay in the loop: whose choice of experts a batch is scored and trained with (actor.routing_replay), and where it waits.

trainer    the routers' own choice is recorded while the batch is scored, and replayed in its updates
server     the servers' choice came with the responses (Collector); it is replayed when the batch is scored and in its updates
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_minpro.batch.folders import ROUTING_FOLDER
from megatron_minpro.batch.routing_file import RoutingFile
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.loop.training_run import TrainingRun, share
from parallel.routing_replay import RoutingCounts


def score_with_experts(
    run: TrainingRun, batch: RolloutBatch, metrics: dict[str, float], entropies: list[Tensor] | None
) -> tuple[list[Tensor], RolloutBatch]:
    """Collective. The trainer's log-probs of the batch, and the batch with the place of its experts.

    Args:
        run: the run.
        batch: sampled under the weights that the actor has now.
        metrics: gets how far the trainer's own choice is from the servers', where theirs is replayed.
        entropies: gets those of the same distributions.
    """
    replay = run.config.actor.routing_replay
    if replay == "none":
        return run.actor.logprobs([sample.sequence() for sample in batch.samples], entropies=entropies), batch
    if replay == "server":
        experts = experts_of(run, batch)
        logprobs = run.actor.logprobs([sample.sequence(experts[sample.sample_id]) for sample in batch.samples], entropies=entropies)
        counts = run.actor.routing
        assert counts is not None, "the sampler asks for experts"
        metrics |= {"routing/scored_missing": _missing(counts), **_differing("scored_differing", counts)}
        return logprobs, batch
    lengths = _lengths(batch)
    file = RoutingFile.of(run.actor.architecture, step=batch.sampled_at_step, lengths=lengths)
    create_together(run, file)
    with file.writer(folder_of(run), lengths) as writer:
        logprobs = run.actor.logprobs([sample.sequence() for sample in batch.samples], record=writer, entropies=entropies)
    dist.barrier(group=run.control_group)  # every rank has closed the file before one opens it to read
    return logprobs, replace(batch, routing=file)


def experts_of(run: TrainingRun, batch: RolloutBatch) -> dict[str, Tensor | None]:
    """By sample: the rows of its experts, views of the mapped file; None where nothing is replayed."""
    if batch.routing is None:
        return dict.fromkeys(sample.sample_id for sample in batch.samples)
    rows = batch.routing.rows(folder_of(run), _lengths(batch))
    return {sample.sample_id: experts for sample, experts in zip(batch.samples, rows, strict=True)}


def trained_metrics(counts: Sequence[RoutingCounts | None]) -> dict[str, float]:
    """Of a batch's updates, in order: how far the routers have moved from the experts that are replayed."""
    known = [count for count in counts if count is not None]
    if not known:
        return {}
    total = RoutingCounts(
        replayed=sum(count.replayed for count in known),
        missing=sum(count.missing for count in known),
        differing=sum(count.differing for count in known),
    )
    return {
        "routing/missing": _missing(total),
        **_differing("differing", total),
        **_differing("differing_lag_min", known[0]),
        **_differing("differing_lag_max", known[-1]),
    }


def folder_of(run: TrainingRun) -> Path:
    """Holds the files of the batches that wait."""
    return run.config.run_dir / ROUTING_FOLDER


def create_together(run: TrainingRun, file: RoutingFile) -> None:
    """Collective. Rank 0 makes the file. Raises RuntimeError on all ranks where it cannot."""
    failure = None
    if run.driver is not None:
        try:
            file.create(folder_of(run))
        except OSError as error:
            failure = f"{folder_of(run) / file.name}: cannot be made: {error}"
    failure = share(run, failure)
    if failure is not None:
        raise RuntimeError(failure)


def _lengths(batch: RolloutBatch) -> list[int]:
    return [len(sample.token_ids) - 1 for sample in batch.samples]


def _missing(counts: RoutingCounts) -> float:
    return counts.missing / (counts.replayed + counts.missing)


def _differing(name: str, counts: RoutingCounts) -> dict[str, float]:
    """Nothing where no row is known."""
    return {f"routing/{name}": counts.differing / counts.replayed} if counts.replayed else {}
