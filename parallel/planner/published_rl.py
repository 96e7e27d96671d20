"""Published steps of reinforcement learning and the planner's prediction for each. Shown, not fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import yaml

from parallel.layout import ParallelLayout
from parallel.planner.hardware import read_hardware
from parallel.planner.lengths import exponential
from parallel.planner.plan import Work, make_plan
from parallel.planner.published import ROWS, pipeline_of, shape_of
from parallel.planner.rl import GlobalStep
from parallel.planner.rollout_server import RolloutServer, rollout_server
from parallel.planner.sampling import Rollouts
from parallel.planner.training import Training

_PROMPT_TOKENS = 100
_GROUP_SIZE = 1  # not published; sharing so short a prompt matters little
_SYNC_S = 7.0  # published for these systems, 5 to 10 s; this project's own sender is slower for large models
_TRAINING = Training(
    precision="bf16",
    spec="fused",
    on_cpu=False,
    recompute="full",
    dispatcher="alltoall",
    overlap=False,
    cuda_graphs="none",
    fp8_attention=False,
    fsdp=False,
    imbalance=1.55,
    gradient_bytes=4,
    chunk_tokens=None,
    release=26.04,
)


@dataclass(frozen=True)
class RlRow:
    """One published global step beside its prediction."""

    id: str
    published_s: float
    predicted_s: float
    sampling_s: float
    parts: GlobalStep


def read_rl_rows() -> list[RlRow]:
    return [_row(values) for values in yaml.safe_load(ROWS.read_text())["rl"]]


def _row(values: dict[str, Any]) -> RlRow:
    tp = values.get("tp", 1)
    colocated = values["sampling_gpus"] == values["gpus"]
    layout = ParallelLayout(
        world_size=values["gpus"] - (0 if colocated else values["sampling_gpus"]),
        tp=tp,
        cp=values.get("cp", 1),
        ep=values["ep"],
        sequence_parallel=tp > 1,
        **pipeline_of(values),
    )
    rollouts = Rollouts(
        sequences=values["sequences"],
        group_size=_GROUP_SIZE,
        prompt_tokens=_PROMPT_TOKENS,
        lengths=exponential(values["mean"] - _PROMPT_TOKENS, values["max"] - _PROMPT_TOKENS),
        servers=values["sampling_gpus"] // values["server_tp"],
        tp=values["server_tp"],
    )
    work = Work(
        sequences=values["sequences"],
        mean_tokens=values["mean"],
        max_tokens=values["max"],
        micro_batch_tokens=values["max"],
        updates_per_step=1,
        staleness=values["staleness"],
        rollouts=rollouts,
        colocated=colocated,
    )
    shape, hardware = shape_of(values["model"]), read_hardware(values["hardware"])
    step = make_plan(shape, layout, _TRAINING, hardware, work).global_step
    assert step is not None
    parts = replace(step, logprobs_s=2 * step.logprobs_s)  # the reference's too
    sampling_s = parts.sampling.batch_s
    if values["staleness"] > 1:
        server = rollout_server(shape, hardware, tp=rollouts.tp)
        sampling_s = min(sampling_s, _continuous_s(server, rollouts, batches_under_way=values["staleness"]))
    training_s = parts.logprobs_s + parts.updates_s
    beside_s = max(sampling_s, training_s) if values["staleness"] else sampling_s + training_s
    return RlRow(id=values["id"], published_s=values["step_s"], predicted_s=beside_s + _SYNC_S, sampling_s=sampling_s, parts=parts)


def _continuous_s(server: RolloutServer, rollouts: Rollouts, *, batches_under_way: int) -> float:
    """Seconds per batch of systems that give up a fixed lag: the next batches fill the servers while the last responses finish."""
    share = rollouts.sequences / rollouts.servers
    context = rollouts.prompt_tokens + rollouts.lengths.under_way
    together = max(1.0, min(share * batches_under_way, server.room_tokens / context))
    return share * (server.prefill_s(rollouts.prompt_tokens) + rollouts.lengths.mean * server.step_s(together, context) / together)
