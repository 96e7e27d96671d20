"""The planner's peak against the rehearsal's: the project's own CUDA code on fake tensors, on every axis and recompute setting."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from parallel.planner.rehearsed import MOST_ABOVE, MOST_BELOW, Parity, parity
from parallel.rehearsal.launch import rehearse
from parallel.rehearsal.request import RehearsalRequest
from tests.parallel.rehearsal.tiny import DENSE, MOE, TIED, request

# Wide enough that tensors outweigh the rounding of small blocks; as many micro-batches as a pipeline holds at once.
WIDE = {"vocab_size": 2048, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64, "intermediate_size": 1536}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 256}
FOUR, FIVE = (MOE | {"num_hidden_layers": layers} for layers in (4, 5))
SEQUENCES = 8  # of 512 tokens; 2,048 tokens a micro-batch


def wide(model: dict, *, sequences: int = SEQUENCES, **changes: object) -> RehearsalRequest:
    sizes = WIDE | (EXPERTS if "num_experts" in model else {})
    return request(
        model | sizes, lengths=(512,) * sequences, max_tokens_per_micro_batch=2048, phases=("build", "keep", "score", "update"), **changes
    )


REQUESTS: Mapping[str, RehearsalRequest] = {
    "one rank": wide(MOE, world_size=1),
    "tp sp cp ep": wide(MOE, rank=5, world_size=8, tp=2, cp=2, ep=4),
    "tp ep, nothing recomputed": wide(MOE, world_size=4, tp=2, ep=2, recompute="none"),
    "etp, selective": wide(MOE, world_size=4, tp=2, etp=2, ep=2, recompute="selective", kept_weights="device"),
    "pp first": wide(MOE, sequences=16, world_size=4, pp=2, ep=2, recompute="none"),
    "pp last": wide(MOE, rank=2, world_size=4, pp=2, ep=2),
    "vpp last": wide(FOUR, sequences=16, rank=1, world_size=2, pp=2, vpp=2),
    "uneven first": wide(FIVE, sequences=16, world_size=4, pp=2, ep=2, recompute="none", count_loss_as_layer=True),
    "uneven last": wide(FIVE, rank=2, world_size=4, pp=2, ep=2, count_loss_as_layer=True),
    "dense": wide(DENSE, world_size=2, tp=2),
    "tied, cp": wide(TIED, world_size=2, cp=2, recompute="none"),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Parity]:
    return {name: parity(result) for name, result in zip(REQUESTS, rehearse(list(REQUESTS.values())), strict=True)}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_planned_peak_is_the_rehearsed_one(name: str, found: dict[str, Parity]) -> None:
    each = found[name]
    assert -MOST_BELOW <= each.error <= MOST_ABOVE, (each.error, each.planned.parts(), each.result.fullest.by_kind)
    # A layout of these whose transient part were forgotten would be far below.
    resident = each.result.phase("build").after
    assert each.result.fullest.peak > 1.1 * resident


def test_the_moment_is_the_phase_that_was_fullest(found: dict[str, Parity]) -> None:
    assert {each.result.fullest.name for each in found.values()} == {"update"}
    assert {each.planned.moment for each in found.values()} <= {"forward", "head", "backward"}
    assert len({each.planned.moment for each in found.values()}) > 1
