"""Which layers a stage holds: Megatron-Core's own functions say the same, and refuse the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parallel.layout import ParallelLayout
from parallel.mcore import TransformerConfig, parallel_state
from parallel.stages import Pipeline, alternatives


def megatrons(num_layers: int, pp: int, vpp: int | None, **options: Any) -> list[list[tuple[int, int]]]:
    """[stage][virtual stage] of (first, last), by Megatron-Core's own functions. Raises what they raise."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        use_cpu_initialization=True,
        pipeline_dtype=None if pp == 1 else "float32",
        **options,
    )
    found = []
    before = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
    try:
        for rank in range(pp):
            parallel_state.set_pipeline_model_parallel_rank(rank)  # 0.16.1 reads it there for a list, and nowhere else
            stages = range(vpp) if vpp else [None]
            counts = [get_num_layers_to_build(config, vp_stage=stage, pp_rank=rank) for stage in stages]
            starts = [get_transformer_layer_offset(config, vp_stage=stage, pp_rank=rank) for stage in stages]
            found.append([(start, start + count) for start, count in zip(starts, counts, strict=True)])
    finally:
        parallel_state.set_pipeline_model_parallel_rank(None)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(before)
    return found


def ours(pipeline: Pipeline, num_layers: int) -> list[list[tuple[int, int]]]:
    pipeline.check_stages()
    return [[(chunk.first, chunk.last) for chunk in pipeline.chunks_of_rank(num_layers, rank)] for rank in range(pipeline.pp)]


SIZE = st.one_of(st.none(), st.integers(1, 12))


@settings(max_examples=250, deadline=None)
@given(
    num_layers=st.integers(1, 50),
    pp=st.integers(1, 8),
    vpp=st.one_of(st.none(), st.integers(2, 4)),
    embedding=st.booleans(),
    loss=st.booleans(),
    first=SIZE,
    last=SIZE,
)
@example(num_layers=94, pp=8, vpp=4, embedding=True, loss=True, first=None, last=None)
@example(num_layers=94, pp=32, vpp=3, embedding=True, loss=True, first=None, last=None)
@example(num_layers=5, pp=2, vpp=None, embedding=False, loss=True, first=None, last=None)
@example(num_layers=12, pp=4, vpp=2, embedding=False, loss=False, first=2, last=2)
@example(num_layers=6, pp=2, vpp=2, embedding=False, loss=False, first=2, last=4)
@example(num_layers=11, pp=3, vpp=None, embedding=False, loss=False, first=None, last=3)
def test_even_counted_and_sized_stages_are_megatrons(
    num_layers: int, pp: int, vpp: int | None, embedding: bool, loss: bool, first: int | None, last: int | None
) -> None:
    vpp = vpp if pp > 1 else None
    if pp == 1 or embedding or loss:
        first = last = None  # what contradicts is refused by both; see below
    pipeline = Pipeline(
        pp=pp,
        vpp=vpp,
        count_embedding_as_layer=embedding,
        count_loss_as_layer=loss,
        layers_in_first_stage=first,
        layers_in_last_stage=last,
    )
    options = {
        "account_for_embedding_in_pipeline_split": embedding,
        "account_for_loss_in_pipeline_split": loss,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
    }
    try:
        expected = megatrons(num_layers, pp, vpp, **options)
    except ZeroDivisionError:  # 0.16.1, virtual stages and no rank between the ends
        assert first is not None and last is not None and pp == 2 and vpp is not None
        each, rest = first // vpp, last // vpp
        starts = [stage * (each + rest) for stage in range(vpp)]
        expected = [[(start, start + each) for start in starts], [(start + each, start + each + rest) for start in starts]]
    except (ValueError, AssertionError):
        with pytest.raises(ValueError, match=r"^parallel: "):
            ours(pipeline, num_layers)
        return
    if any(end < start for rank in expected for start, end in rank):  # 0.16.1 does not notice
        with pytest.raises(ValueError, match=rf"^parallel: -\d+ of {num_layers} layers are left by "):
            ours(pipeline, num_layers)
        return
    if any(sum(end - start for start, end in rank) == 0 for rank in expected):  # Megatron-Core allows a rank of an embedding alone
        with pytest.raises(ValueError, match=rf"^parallel: stage \d+ of pp={pp} would hold none of the {num_layers} layers"):
            ours(pipeline, num_layers)
        return
    assert ours(pipeline, num_layers) == expected


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=24), vpp=st.one_of(st.none(), st.integers(2, 4)))
def test_listed_stages_are_megatrons(sizes: list[int], vpp: int | None) -> None:
    pp = len(sizes) // (vpp or 1)
    if pp < 2:
        return
    sizes = sizes[: pp * (vpp or 1)]
    layout = [["decoder"] * size for size in sizes]
    expected = megatrons(
        sum(sizes), pp, vpp, pipeline_model_parallel_layout=[["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]
    )
    assert ours(Pipeline(pp=pp, vpp=vpp, layers_per_stage=tuple(sizes)), sum(sizes)) == expected


def test_chunks_follow_one_another_and_the_ends_are_marked() -> None:
    chunks = Pipeline(pp=2, vpp=2, count_embedding_as_layer=True, count_loss_as_layer=True).chunks(6)
    assert [(chunk.first, chunk.last, chunk.embeds, chunk.ends) for chunk in chunks] == [
        (0, 1, True, False),
        (1, 3, False, False),
        (3, 5, False, False),
        (5, 6, False, True),
    ]


@pytest.mark.parametrize(
    ("num_layers", "settings_", "message"),
    [
        (
            94,
            {"pp": 8},
            "pp=8 does not divide 94 layers; set parallel.count_embedding_as_layer=true parallel.count_loss_as_layer=true or "
            "parallel.layers_in_last_stage=10",
        ),
        (
            94,
            {"pp": 32, "vpp": 3},
            "pp*vpp=96 does not divide 94 layers; set parallel.count_embedding_as_layer=true parallel.count_loss_as_layer=true",
        ),
        (36, {"pp": 8}, "pp=8 does not divide 36 layers; set parallel.layers_per_stage=[4,4,5,5,5,5,4,4]"),
        (4, {"pp": 6}, "pp=6 does not divide 4 layers"),
        (6, {"pp": 2, "layers_per_stage": (2, 3)}, "layers_per_stage adds up to 5 layers, expected 6"),
        (6, {"pp": 3, "layers_per_stage": (2, 4)}, "layers_per_stage=[2, 4] has 2 numbers, expected pp=3"),
        (6, {"pp": 2, "vpp": 2, "layers_per_stage": (3, 3)}, "layers_per_stage=[3, 3] has 2 numbers, expected pp*vpp=4"),
        (
            6,
            {"pp": 3, "layers_per_stage": (3, 0, 3)},
            "layers_per_stage=[3, 0, 3]: expected at least 1 layer; 0 is possible beside the embedding and beside the loss alone",
        ),
        (6, {"pp": 2, "layers_per_stage": (0, 6)}, "stage 0 of pp=2 would hold none of the 6 layers"),
        (
            6,
            {"pp": 2, "layers_per_stage": (2, 4), "count_loss_as_layer": True},
            "layers_per_stage cannot be combined with count_loss_as_layer; leave one out",
        ),
        (
            6,
            {"pp": 2, "layers_in_first_stage": 2, "count_loss_as_layer": True},
            "layers_in_first_stage cannot be combined with count_loss_as_layer; leave one out",
        ),
        (6, {"pp": 1, "layers_in_first_stage": 6}, "layers_in_first_stage=6 needs pp >= 2, not pp=1"),
        (6, {"pp": 2, "vpp": 2, "layers_in_last_stage": 3}, "vpp=2 does not divide layers_in_last_stage=3"),
        (
            6,
            {"pp": 2, "layers_in_first_stage": 2, "layers_in_last_stage": 3},
            "1 of 6 layers are left by layers_in_first_stage=2 and layers_in_last_stage=3, expected none, since there are no other stages",
        ),
        (
            7,
            {"pp": 3, "layers_in_last_stage": 2},
            "5 of 7 layers are left by layers_in_last_stage=2, expected a multiple of 2, at least one for each of the other stages",
        ),
    ],
)
def test_layers_that_do_not_add_up_are_refused_with_what_would(num_layers: int, settings_: dict, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ParallelLayout(world_size=settings_["pp"], **settings_).chunks(num_layers)
    assert str(refusal.value) == f"parallel: {message}"


@pytest.mark.parametrize(("num_layers", "pp", "vpp"), [(94, 8, None), (94, 8, 4), (48, 7, None), (36, 8, None), (61, 16, None), (7, 2, 3)])
def test_what_an_error_proposes_works(num_layers: int, pp: int, vpp: int | None) -> None:
    found = list(alternatives(num_layers, pp=pp, vpp=vpp))
    assert found
    for way in found:
        layout = ParallelLayout(world_size=pp, pp=pp, vpp=vpp, **way)
        chunks = layout.chunks(num_layers)
        assert [chunk.first for chunk in chunks[1:]] == [chunk.last for chunk in chunks[:-1]]
        assert (chunks[0].first, chunks[-1].last) == (0, num_layers)


def test_a_layout_survives_json() -> None:
    layout = ParallelLayout(world_size=2, pp=2, layers_per_stage=(2, 3))
    assert ParallelLayout(**{**asdict(layout), "layers_per_stage": [2, 3]}) == layout
