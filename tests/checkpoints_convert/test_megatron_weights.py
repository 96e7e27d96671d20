"""One model under every way in which Megatron writes its keys, saved by PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoints_convert.convert import hf_to_megatron
from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.megatron_weights import MegatronWeights
from checkpoints_convert.torch_dist_metadata import FORMAT_FILE
from checkpoints_convert.torch_dist_reader import TorchDistReader
from tests.checkpoints_convert.small_models import MOE, random_weights, write_model

pytestmark = pytest.mark.filterwarnings("ignore")
ARCHITECTURE = Architecture.from_config(MOE, source="config")
ALIASES = ("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight")
EXPERTS = "decoder.layers.mlp.experts.experts."


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of a converted checkpoint: layers and experts stacked, the norm under both names."""
    folder = tmp_path_factory.mktemp("stacked")
    write_model(folder / "hf", MOE, random_weights(MOE))
    hf_to_megatron(folder / "hf", folder / "megatron", workers=1)
    with TorchDistReader(folder / "megatron") as reader:
        return {name: reader.read(name) for name in reader.names}


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def padded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return state | {name: torch.cat([state[name], torch.zeros(32, 32, dtype=torch.bfloat16)]) for name in names}


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in state.items()}


def by_layer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("decoder.layers."):
            found |= {name.replace("layers.", f"layers.{layer}."): each for layer, each in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def by_layer_and_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As with Megatron's singleton_local_shards: gate and up in tensors of their own."""
    found: dict[str, Tensor] = {}
    for name, tensor in by_layer(state).items():
        if ".experts.experts." not in name:
            found[name] = tensor
            continue
        for expert, each in enumerate(tensor):
            own = name.replace("experts.experts.", f"experts.experts.{expert}.")
            halves = zip(("_w", "_v"), each.chunk(2), strict=True) if "linear_fc1" in name else [("", each)]
            found |= {f"{own}{suffix}": half.clone() for suffix, half in halves}
    return found


def with_optimizer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {f"optimizer.state.exp_avg.{name}": tensor.float() for name, tensor in state.items()}


def own_name_of_the_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = without(ALIASES[1])(state)
    first = state.pop("decoder.layers.self_attention.linear_qkv.layer_norm_weight")
    return state | {"decoder.layers.input_layernorm.weight": first}


VARIANTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "both names of the norm": dict,
    "the TransformerEngine spec's": without(ALIASES[1]),
    "the local spec's": without(ALIASES[0]),
    "own name of the norm": own_name_of_the_norm,
    "padded vocabulary": padded,
    "prefixed": prefixed,
    "layers numbered": by_layer,
    "layers and experts numbered": by_layer_and_expert,
    "with optimizer": with_optimizer,
    "all at once": lambda state: with_optimizer(prefixed(by_layer(padded(state)))),
}


def save(folder: Path, state: dict[str, Tensor]) -> None:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / FORMAT_FILE).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_of_writing_keys_gives_the_same_model(variant: str, stacked: dict[str, Tensor], tmp_path: Path) -> None:
    save(tmp_path, VARIANTS[variant](dict(stacked)))
    expected = random_weights(MOE)
    with MegatronWeights(tmp_path, ARCHITECTURE) as weights:
        assert list(weights.names) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(weights.read(name), tensor)
            assert torch.equal(weights.read_rows(name, 1, 4), tensor[1:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("decoder.layers.mlp.router.weight"), r"decoder\.layers\.0\.mlp\.router\.weight is missing"),
        (without("embedding.word_embeddings.weight"), "0 tensors end in embedding"),
        (lambda state: state | {"decoder.layers.mlp.bias": torch.zeros(3)}, r"holds 1 tensors .*decoder\.layers\.mlp\.bias"),
        (
            lambda state: state | {EXPERTS + "linear_fc2.weight": state[EXPERTS + "linear_fc2.weight"][:2]},
            r"shape of .*linear_fc2.* is \(2,",
        ),
        (lambda state: state | {"output_layer.weight": state["output_layer.weight"][:90]}, r"shape of 'output_layer.weight' is \(90, 32\)"),
        (lambda state: state | {ALIASES[0]: 2 * state[ALIASES[0]]}, "is saved as .* and, with other values, as"),
    ],
    ids=["missing", "no embedding", "unknown", "too few layers", "vocabulary too short", "contradicting names"],
)
def test_another_model_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, stacked: dict[str, Tensor], tmp_path: Path
) -> None:
    save(tmp_path, change(dict(stacked)))
    with pytest.raises(ValueError, match=message):
        MegatronWeights(tmp_path, ARCHITECTURE)
