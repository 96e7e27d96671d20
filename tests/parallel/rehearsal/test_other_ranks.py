"""Names that other ranks would announce, against the mapping table."""

from __future__ import annotations

import re

import pytest

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import parameters
from parallel.layout import ParallelLayout
from parallel.rehearsal.other_ranks import answer_of
from tests.parallel.rehearsal.tiny import DEEP, TIED

_LAYOUT = ParallelLayout(world_size=8, pp=2, cp=2, ep=2, layers_in_last_stage=1)
STAGES = ({0, 1, 2}, {3})


def held(architecture: Architecture, layout: ParallelLayout, rank: int) -> set[str]:
    """Names of a rank's parameters, from the table of all parameters."""
    place = layout.coordinates(rank)
    found = set()
    for parameter in parameters(architecture):
        name = parameter.megatron_name
        layer, expert = parameter.layer, re.search(r"local_experts\.(\d+)", name)
        if layer is None:
            stage = 0 if name.startswith("embedding") else layout.pp - 1
            mine = place.pp == stage
        else:
            mine = layer in STAGES[place.pp]
        if expert is not None:
            assert architecture.num_experts is not None
            mine &= int(expert[1]) // (architecture.num_experts // layout.ep) == place.ep
        if mine:
            found.add(name)
    return found


@pytest.mark.parametrize("me", [0, 7])
@pytest.mark.parametrize("rank", range(8))
def test_names_are_those_that_the_other_rank_holds(me: int, rank: int) -> None:
    architecture = Architecture.from_config(DEEP, source="tiny")
    answer = answer_of(sorted(held(architecture, _LAYOUT, me)), rank, me=me, architecture=architecture, layout=_LAYOUT)
    assert set(answer) == held(architecture, _LAYOUT, rank)


def test_a_tied_head_has_a_copy_on_the_last_stage() -> None:
    architecture = Architecture.from_config(TIED, source="tiny")
    layout = ParallelLayout(world_size=2, pp=2)
    mine = ["embedding.word_embeddings.weight", "decoder.layers.0.input_layernorm.weight"]
    answer = answer_of(mine, 1, me=0, architecture=architecture, layout=layout)
    assert answer == ["decoder.layers.1.input_layernorm.weight", "decoder.final_layernorm.weight", "output_layer.weight"]


def test_other_objects_are_handed_back() -> None:
    architecture = Architecture.from_config(DEEP, source="tiny")
    assert answer_of({"a": 1}, 3, me=0, architecture=architecture, layout=_LAYOUT) == {"a": 1}
    assert answer_of(["plain", "words"], 3, me=0, architecture=architecture, layout=_LAYOUT) == ["plain", "words"]
