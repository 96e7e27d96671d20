"""Parameters and FLOPs against the tensor table and against numbers worked by hand."""

from __future__ import annotations

import json
import math

import pytest

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import parameters
from parallel.layout import ParallelLayout
from parallel.planner.models import FOLDER, find_shape, known_models
from parallel.planner.published import shape_of
from parallel.planner.shape import from_config
from parallel.planner.stages import check_layout, chunks_of_rank, stage_parameters
from parallel.stages import COUNTED

QWEN = [name for name in known_models() if name.startswith("qwen3")]


def architecture_of(name: str) -> Architecture:
    return Architecture.from_config(json.loads((FOLDER / f"{name}.json").read_text()), source=name)


@pytest.mark.parametrize("name", QWEN)
def test_parameters_are_those_of_the_tensor_table(name: str) -> None:
    table = list(parameters(architecture_of(name)))
    shape = shape_of(name)
    assert shape.total_parameters == sum(math.prod(parameter.megatron_shape) for parameter in table)
    assert shape.expert_parameters == sum(math.prod(parameter.megatron_shape) for parameter in table if parameter.is_expert)


def test_flops_of_qwen3_30b_are_those_of_a_count_by_hand() -> None:
    attention = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    experts = 8 * 3 * 2048 * 768
    core = 48 * 2 * 32 * 128 * 4096  # QK^T and PV, half the square each
    assert shape_of("qwen3_30b_a3b").flops_per_token(4096) == 3 * (2 * (48 * (attention + experts) + 151936 * 2048) + core)


def test_deepseek_v3_has_671_billion_parameters_beside_its_extra_layer() -> None:
    config = json.loads((FOLDER / "deepseek_v3.json").read_text())
    without = from_config(config | {"num_nextn_predict_layers": 0}, name="dsv3", source="dsv3")
    assert without.total_parameters == pytest.approx(671.0e9, rel=1e-3)


@pytest.mark.parametrize("layout", [{"pp": 1}, {"pp": 2, "ep": 4}, {"pp": 4, "vpp": 3, "tp": 2}, {"tp": 4, "ep": 8, "etp": 2}])
def test_every_parameter_is_on_exactly_one_rank_of_a_replica(layout: dict) -> None:
    shape = shape_of("qwen3_30b_a3b")
    found = ParallelLayout(world_size=64, sequence_parallel=layout.get("tp", 1) > 1, **layout)
    stages = [stage_parameters(shape, found, stage) for stage in range(found.pp)]
    assert sum(stage.expert for stage in stages) * found.ep * found.etp == shape.expert_parameters
    replicated = 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048  # norms and routers are whole on every tensor-parallel rank
    dense = sum(stage.dense for stage in stages) - replicated
    assert dense * found.tp + replicated == shape.total_parameters - shape.expert_parameters


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen3_8b"])
@pytest.mark.parametrize(
    "axes", [{"tp": 8}, {"ep": 3, "world_size": 48}, {"pp": 7, "world_size": 56}, {"pp": 4, "vpp": 5}, {"etp": 7, "world_size": 56}]
)
def test_layouts_are_refused_in_the_words_of_the_layout_itself(name: str, axes: dict) -> None:
    layout = ParallelLayout(**{"world_size": 64, "sequence_parallel": axes.get("tp", 1) > 1, **axes})
    try:
        layout.check_model(architecture_of(name))
    except ValueError as error:
        with pytest.raises(ValueError) as refused:
            check_layout(shape_of(name), layout)
        assert str(refused.value) == str(error)
    else:
        check_layout(shape_of(name), layout)


def test_94_layers_on_32_chunks_are_even_with_embedding_and_loss_as_layers() -> None:
    layout = ParallelLayout(world_size=256, tp=2, pp=8, vpp=4, ep=32, sequence_parallel=True, **COUNTED[0])
    stages = [chunks_of_rank(shape_of("qwen3_235b_a22b"), layout, stage) for stage in range(8)]
    assert [sum(chunk.num_layers for chunk in stage) for stage in stages] == [11, 12, 12, 12, 12, 12, 12, 11]
    assert stages[0][0].embeds and stages[7][3].ends


def test_a_model_is_found_by_its_published_name_or_refused() -> None:
    assert find_shape("models/Qwen3-30B-A3B-Base", architecture=None) == shape_of("qwen3_30b_a3b")
    with pytest.raises(ValueError, match=r"models/Qwen3-31B does not exist.*--model-config"):
        find_shape("models/Qwen3-31B", architecture=None)
