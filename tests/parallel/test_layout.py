"""ParallelLayout against tables written by hand and against Megatron-Core's own rank generator; every rule with its message."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from checkpoints_convert.hf_config import Architecture
from parallel import process_groups
from parallel.layout import ParallelLayout
from parallel.mcore import parallel_state

MOE = Architecture(
    model_type="qwen3_moe",
    vocab_size=96,
    hidden_size=36,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    intermediate_size=40,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=24,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    dtype=None,
)


def dense(**fields: int) -> Architecture:
    return altered(
        model_type="qwen3", num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=None, **fields
    )


def altered(**fields: object) -> Architecture:
    return Architecture(**{name: getattr(MOE, name) for name in Architecture.__dataclass_fields__} | fields)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 0}, "parallel: world_size=0 must be at least 1"),
        ({"world_size": 2, "tp": 0}, "parallel: tp=0 must be at least 1"),
        ({"world_size": 2, "pp": -1}, "parallel: pp=-1 must be at least 1"),
        ({"world_size": 2, "cp": 0}, "parallel: cp=0 must be at least 1"),
        ({"world_size": 2, "ep": 0}, "parallel: ep=0 must be at least 1"),
        ({"world_size": 2, "etp": 0}, "parallel: etp=0 must be at least 1"),
        ({"world_size": 12, "tp": 2, "pp": 2, "cp": 2}, "parallel: world_size=12 is not a multiple of tp*pp*cp = 2*2*2 = 8"),
        ({"world_size": 8, "ep": 3, "pp": 2}, "parallel: world_size=8 is not a multiple of ep*etp*pp = 3*1*2 = 6"),
        ({"world_size": 8, "ep": 4, "etp": 4}, "parallel: world_size=8 is not a multiple of ep*etp*pp = 4*4*1 = 16"),
        ({"world_size": 4, "pp": 2, "vpp": 1}, "parallel: vpp=1 must be null or at least 2"),
        ({"world_size": 4, "vpp": 2}, "parallel: vpp=2 needs pp >= 2, not pp=1"),
        ({"world_size": 4, "sequence_parallel": True}, "parallel: sequence_parallel=true needs tp > 1, not tp=1"),
    ],
)
def test_a_layout_that_no_model_could_run_is_refused_with_its_rule(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ParallelLayout(**sizes)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("sizes", "architecture", "message"),
    [
        ({"world_size": 5, "pp": 5}, MOE, "parallel: pp=5 does not divide 12 layers; set parallel.layers_per_stage=[2,3,3,2,2]"),
        (
            {"world_size": 4, "pp": 4, "vpp": 2},
            MOE,
            "parallel: pp*vpp=8 does not divide 12 layers; set parallel.layers_per_stage=[1,1,2,2,2,2,1,1]",
        ),
        ({"world_size": 3, "tp": 3, "sequence_parallel": True}, MOE, "parallel: tp=3 does not divide 8 attention heads"),
        ({"world_size": 8, "tp": 8, "sequence_parallel": True}, MOE, "parallel: tp=8 does not divide 4 key-value heads"),
        (
            {"world_size": 2, "tp": 2, "sequence_parallel": True},
            altered(vocab_size=97),
            "parallel: tp=2 does not divide the vocabulary of 97",
        ),
        ({"world_size": 2, "tp": 2, "sequence_parallel": True}, altered(hidden_size=35), "parallel: tp=2 does not divide hidden size 35"),
        ({"world_size": 2, "ep": 2}, dense(), "parallel: ep=2 needs a mixture-of-experts model, this one is dense"),
        ({"world_size": 2, "etp": 2}, dense(), "parallel: etp=2 needs a mixture-of-experts model, this one is dense"),
        ({"world_size": 2, "tp": 2}, dense(intermediate_size=41), "parallel: tp=2 does not divide intermediate size 41"),
        ({"world_size": 6, "ep": 6}, MOE, "parallel: ep=6 does not divide 128 experts"),
        ({"world_size": 5, "etp": 5}, MOE, "parallel: etp=5 does not divide expert intermediate size 24"),
        ({"world_size": 2, "tp": 2}, MOE, "parallel: tp=2 with a mixture-of-experts model needs sequence_parallel=true"),
    ],
)
def test_a_layout_that_the_model_does_not_fit_is_refused_with_its_rule(sizes: dict, architecture: Architecture, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ParallelLayout(**sizes).check_model(architecture)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("sizes", "architecture"),
    [
        ({"world_size": 64, "tp": 4, "pp": 2, "cp": 2, "ep": 8, "etp": 2, "sequence_parallel": True}, MOE),
        ({"world_size": 4, "pp": 2, "vpp": 3}, MOE),
        ({"world_size": 4, "tp": 4}, dense()),  # tensor parallelism alone is fine without experts
        ({"world_size": 2, "tp": 2}, dense(hidden_size=35)),  # only sequence parallelism cuts the hidden size
        ({"world_size": 128, "ep": 128}, altered(intermediate_size=41)),  # unused by a mixture of experts
    ],
)
def test_a_legal_layout_is_accepted(sizes: dict, architecture: Architecture) -> None:
    ParallelLayout(**sizes).check_model(architecture)


def test_coordinates_of_eight_ranks_on_tp2_pp2_ep2_equal_the_table() -> None:
    layout = ParallelLayout(world_size=8, tp=2, pp=2, ep=2, sequence_parallel=True)
    #        tp cp dp pp etp ep edp
    table = [
        (0, 0, 0, 0, 0, 0, 0),
        (1, 0, 0, 0, 0, 1, 0),
        (0, 0, 1, 0, 0, 0, 1),
        (1, 0, 1, 0, 0, 1, 1),
        (0, 0, 0, 1, 0, 0, 0),
        (1, 0, 0, 1, 0, 1, 0),
        (0, 0, 1, 1, 0, 0, 1),
        (1, 0, 1, 1, 0, 1, 1),
    ]
    assert [axes(layout, rank) for rank in range(8)] == table
    assert (layout.dp, layout.edp) == (2, 2)


def test_coordinates_of_eight_ranks_on_cp2_dp4_etp2_ep4_equal_the_table() -> None:
    layout = ParallelLayout(world_size=8, cp=2, ep=4, etp=2)
    table = [
        (0, 0, 0, 0, 0, 0, 0),
        (0, 1, 0, 0, 1, 0, 0),
        (0, 0, 1, 0, 0, 1, 0),
        (0, 1, 1, 0, 1, 1, 0),
        (0, 0, 2, 0, 0, 2, 0),
        (0, 1, 2, 0, 1, 2, 0),
        (0, 0, 3, 0, 0, 3, 0),
        (0, 1, 3, 0, 1, 3, 0),
    ]
    assert [axes(layout, rank) for rank in range(8)] == table
    assert (layout.dp, layout.edp) == (4, 1)


def axes(layout: ParallelLayout, rank: int) -> tuple[int, ...]:
    place = layout.coordinates(rank)
    assert place.rank == rank
    return place.tp, place.cp, place.dp, place.pp, place.etp, place.ep, place.edp


SIZE = st.sampled_from([1, 1, 2, 3, 4])


@settings(max_examples=150, deadline=None)
@given(tp=SIZE, cp=SIZE, pp=SIZE, ep=SIZE, etp=SIZE, replicas=st.integers(1, 6))
def test_every_group_of_ranks_is_megatrons(tp: int, cp: int, pp: int, ep: int, etp: int, replicas: int) -> None:
    world_size = tp * cp * pp * replicas
    assume(world_size % (ep * etp * pp) == 0)
    layout = ParallelLayout(world_size=world_size, tp=tp, pp=pp, cp=cp, ep=ep, etp=etp)
    assert (layout.dp, layout.edp) == (replicas, world_size // (ep * etp * pp))
    order = "tp-cp-ep-dp-pp"
    dense_ranks = parallel_state.RankGenerator(tp=tp, ep=1, dp=replicas, pp=pp, cp=cp, order=order)
    expert_ranks = parallel_state.RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order=order)
    for generator, names in (
        (dense_ranks, {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp"}),
        (expert_ranks, {"tp": "etp", "ep": "ep", "dp": "edp"}),
    ):
        for theirs, ours in names.items():
            for group in generator.get_ranks(theirs):
                assert [getattr(layout.coordinates(rank), ours) for rank in group] == list(range(len(group)))
                others = {tuple(getattr(layout.coordinates(rank), other) for other in names.values() if other != ours) for rank in group}
                assert len(others) == 1, f"the {ours} group {group} differs on another axis"
    last_stage = [group[-1] for group in dense_ranks.get_ranks("pp")]
    assert layout.first_rank_of_last_stage == min(last_stage)


def test_a_rank_outside_the_world_is_refused() -> None:
    layout = ParallelLayout(world_size=4)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=rf"^parallel: rank={rank} is outside world_size=4$"):
            layout.coordinates(rank)


@pytest.mark.parametrize(
    ("sizes", "multiple"),
    [
        ({"world_size": 4}, 1),
        ({"world_size": 4, "tp": 2}, 1),
        ({"world_size": 4, "tp": 4, "sequence_parallel": True}, 4),
        ({"world_size": 4, "cp": 2}, 4),
        ({"world_size": 6, "cp": 3, "tp": 2, "sequence_parallel": True}, 12),
    ],
)
def test_sequences_are_padded_to_what_context_and_sequence_parallelism_cut(sizes: dict, multiple: int) -> None:
    assert ParallelLayout(**sizes).sequence_multiple == multiple


def test_another_number_of_ranks_than_the_layouts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"^parallel: world_size=4 but 3 ranks were launched$"):
        process_groups.initialize(ParallelLayout(world_size=4), backend="gloo", seed=0, timeout_s=1)
    assert not torch.distributed.is_initialized()
