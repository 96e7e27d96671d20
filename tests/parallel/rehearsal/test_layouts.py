"""Every axis and option of the parity table is rehearsed: all phases come to their end, and state weighs what it must."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from megatron_minpro.cluster.planning import training_of
from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.config import load_config
from parallel.layout import ParallelLayout
from parallel.planner.hardware import read_hardware
from parallel.planner.memory import gradient_bytes, optimizer_bytes, parameter_bytes
from parallel.planner.shape import from_config
from parallel.rehearsal.launch import rehearse
from parallel.rehearsal.ledger_kinds import KINDS
from parallel.rehearsal.request import PHASES, RehearsalRequest
from parallel.rehearsal.result import RehearsalResult
from parallel.stages import COUNTED
from tests.parallel.rehearsal.tiny import DEEP, DENSE, MOE, TIED, request

# Of the last rank but one where ranks differ. Both ends of a pipeline.
REQUESTS: Mapping[str, RehearsalRequest] = {
    "one rank": request(MOE, world_size=1),
    "tp sp cp ep": request(MOE, rank=5, world_size=8, tp=2, cp=2, ep=4),
    "etp": request(MOE, world_size=4, tp=2, etp=2, ep=2),
    "pp first": request(MOE, world_size=4, pp=2, tp=2, ep=2),
    "pp last": request(MOE, rank=3, world_size=4, pp=2, tp=2, ep=2),
    "pp of four, inner": request(DEEP, rank=4, world_size=8, pp=4, ep=2),
    "vpp first": request(DEEP, world_size=8, pp=2, vpp=2, cp=2, ep=2),
    "vpp last": request(DEEP, rank=4, world_size=8, pp=2, vpp=2, cp=2, ep=2),
    "vpp, embedding alone": request(DEEP, world_size=2, pp=2, vpp=3, **COUNTED[0]),
    "vpp, head alone": request(DEEP, rank=1, world_size=2, pp=2, vpp=3, **COUNTED[0]),
    "dense": request(DENSE, world_size=4, tp=2, recompute="none"),
    "dense, selective": request(DENSE, world_size=2, cp=2, recompute="selective"),
    "recomputed modules": request(
        DENSE, world_size=2, tp=2, recompute="selective", megatron_options={"recompute_modules": ["mlp", "core_attn"]}
    ),
    "float32": request(MOE, world_size=2, ep=2, dtype="float32"),
    "tied": request(TIED, world_size=2),
    "tied, pp first": request(TIED, world_size=2, pp=2),
    "tied, pp last": request(TIED, rank=1, world_size=2, pp=2),
    "overlap": request(MOE, world_size=4, ep=2, megatron_options={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "allgather dispatcher": request(MOE, world_size=4, ep=4, megatron_options={"moe_token_dispatcher_type": "allgather"}),
    "balance loss": request(
        MOE, world_size=2, ep=2, megatron_options={"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}
    ),
    # Its routing maps are made of floats, and these are large: more than 2,048 tokens on a rank.
    "deterministic": request(
        MOE, world_size=8, tp=2, cp=2, ep=4, deterministic=True, lengths=(16384, 16384), max_tokens_per_micro_batch=16384
    ),
    "centred scores": request(MOE, world_size=4, tp=2, ep=2, top_tokens=40),
    "kept weights": request(MOE, world_size=2, ep=2, kept_weights="device"),
    "offloaded optimizer": request(
        DENSE, world_size=2, megatron_options={"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
    ),
}
_PLAIN_STATE = [name for name in REQUESTS if name not in ("overlap", "offloaded optimizer", "float32")]  # other buckets, on the host, wider
_PAGE = 512


@pytest.fixture(scope="module")
def results() -> dict[str, RehearsalResult]:
    return dict(zip(REQUESTS, rehearse(list(REQUESTS.values())), strict=True))


@pytest.mark.parametrize("name", REQUESTS)
def test_all_phases_come_to_their_end(name: str, results: dict[str, RehearsalResult]) -> None:
    result = results[name]
    assert result.fault is None
    wanted = [phase for phase in PHASES if phase != "keep" or REQUESTS[name].kept_weights is not None]
    assert [phase.name for phase in result.phases] == wanted
    assert result.stage == REQUESTS[name].layout.coordinates(REQUESTS[name].rank).pp


@pytest.mark.parametrize("name", _PLAIN_STATE)
def test_state_after_building_weighs_what_the_planner_counts(name: str, results: dict[str, RehearsalResult]) -> None:
    asked = REQUESTS[name]
    shape = from_config(asked.model, name="tiny", source="tiny")
    run = load_config("qwen3_30b_a3b")
    training = training_of(run, read_hardware("h100"), TrainingChoice())
    stage = results[name].stage
    held = results[name].phase("build").by_kind
    assert held["parameters"] == pytest.approx(parameter_bytes(shape, asked.layout, stage, training), abs=4 * _PAGE)
    assert held["gradients"] == pytest.approx(gradient_bytes(shape, asked.layout, stage, training), abs=4 * _PAGE)
    # Every moment and every master weight of every parameter is a block of its own.
    pieces = 4 * 2 * 16 * asked.model["num_hidden_layers"] * 3
    counted = optimizer_bytes(shape, asked.layout, asked.rank, training)
    assert counted - 8 * pieces <= held["optimizer"] <= counted + pieces * _PAGE


@pytest.mark.parametrize("name", REQUESTS)
def test_building_takes_no_more_memory_than_an_update(name: str, results: dict[str, RehearsalResult]) -> None:
    assert results[name].phase("build").peak <= results[name].phase("update").peak


def test_state_of_a_dense_model_weighs_what_a_hand_counts(results: dict[str, RehearsalResult]) -> None:
    # Per layer on each of 2 tensor-parallel ranks: q 64x128 and o 128x64, k and v 64x64 each, three 64x128 products, halved; four norms.
    layer = (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128) // 2 + 2 * 64 + 2 * 16
    numel = 2 * layer + 2 * 1024 * 64 // 2 + 64
    held = results["dense"].phase("build").by_kind
    assert held["parameters"] == pytest.approx(2 * numel, abs=2048)
    assert held["gradients"] == pytest.approx(4 * numel, abs=4096)


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "offloaded optimizer"])  # it waits for copies to the host
def test_the_host_seldom_waits_for_the_device(name: str, results: dict[str, RehearsalResult]) -> None:
    asked, result = REQUESTS[name], results[name]
    chunks = asked.layout.chunks_of_rank(asked.model["num_hidden_layers"], result.stage)
    moe_layers = sum(chunk.num_layers for chunk in chunks) if "num_experts" in asked.model else 0
    for phase, passes, once in (("score", 1, 2), ("update", 2 if asked.recompute == "full" else 1, 3)):
        waits = results[name].phase(phase).waits
        of_layers = [wait for wait in waits if "moe/" in wait.site or "token_permutation" in wait.site]
        elsewhere = sum(wait.count for wait in waits if wait not in of_layers)
        # A MoE layer reads how many tokens its experts got.
        assert sum(wait.count for wait in of_layers) == moe_layers * passes * result.micro_batches, waits
        # Once per pass: whether a log-prob is NaN; the results, or sums of metrics and the gradient norm.
        assert elsewhere <= 3 * result.micro_batches + once, waits
    [norm] = [wait for wait in result.phase("update").waits if "clip_grads" in wait.site]
    assert norm.count == 1


def test_moments_of_an_offloaded_optimizer_leave_the_device(results: dict[str, RehearsalResult]) -> None:
    held = results["offloaded optimizer"].phase("update").by_kind
    # Megatron leaves the fp32 master weights of this rank's half there: 4 bytes of every second parameter, parameters being bf16.
    assert held["optimizer"] == pytest.approx(held["parameters"], abs=20 * _PAGE)
    on_host = results["offloaded optimizer"].phase("check").host_peak
    assert on_host == pytest.approx(2 * held["parameters"], abs=20 * _PAGE)  # two fp32 moments of the same half


def test_kept_weights_weigh_as_much_as_parameters(results: dict[str, RehearsalResult]) -> None:
    held = results["kept weights"].phase("update").by_kind
    assert held["kept weights"] == held["parameters"]


def test_each_recomputation_keeps_less_than_the_one_before() -> None:
    asked = [
        request(DENSE, world_size=2, tp=2, lengths=(512,) * 2, phases=("build", "update"), **settings)
        for settings in (
            {"recompute": "none"},
            {"recompute": "selective"},
            {"recompute": "selective", "megatron_options": {"recompute_modules": ["mlp", "core_attn"]}},
            {"recompute": "full"},
        )
    ]
    kept = [max(point[KINDS.index("activations")] for point in result.phase("update").timeline) for result in rehearse(asked)]
    assert kept[0] > kept[1] > kept[2] > kept[3] and kept[0] > 1.5 * kept[3]


def test_collectives_are_counted_by_kind_group_and_backend(results: dict[str, RehearsalResult]) -> None:
    found = {(each.kind, each.group, each.size, each.backend): each for each in results["tp sp cp ep"].phase("score").collectives}
    tokens = results["tp sp cp ep"].micro_batch_tokens
    dispatched = found["all_to_all", "ep", 4, "nccl"]
    # Two layers; tokens and their probabilities go out, tokens come back.
    assert dispatched.calls == 2 * results["tp sp cp ep"].micro_batches * 3
    whole = (
        2 * dispatched.calls // 3 * tokens // 2 * 4 * 64 * 2
    )  # both ways of 4 copies of every token of this rank, if micro-batches were equal
    assert 0.5 * whole < dispatched.bytes_in < 1.1 * whole
    assert {each.backend for each in found.values() if each.kind == "all_reduce" and each.group == "all ranks"} == {"nccl", "gloo"}


def test_stages_of_a_pipeline_send_and_receive_whole_micro_batches(results: dict[str, RehearsalResult]) -> None:
    result = results["pp first"]
    sent = next(each for each in result.phase("update").collectives if each.kind == "send")
    received = next(each for each in result.phase("update").collectives if each.kind == "recv")
    assert sent.calls == received.calls == result.micro_batches  # a tensor each; shapes are known (stage_shapes.py)
    assert sent.bytes_in == received.bytes_in


def test_results_survive_json(results: dict[str, RehearsalResult]) -> None:
    for result in results.values():
        assert RehearsalResult.from_json(json.loads(json.dumps(result.as_json()))) == RehearsalResult.from_json(result.as_json())


def test_requests_survive_json() -> None:
    asked = request(DEEP, world_size=8, tp=2, pp=2, vpp=2, ep=2, kept_weights="pinned_host")
    found = RehearsalRequest.from_json(json.loads(json.dumps(asked.as_json())))
    assert found == asked
    assert found.layout == ParallelLayout(world_size=8, tp=2, pp=2, vpp=2, ep=2, sequence_parallel=True)
