"""Two of it are run by test_converted_checkpoints.py: actors of several layouts, one after the other, start from a converted checkpoint.

Argument: REQUEST_JSON.

The request: fixture (Hugging Face folder with sequences), converted (torch_dist), out, layouts {name: layout}, ports (one per layout: a
store remembers the addresses of the groups before) and padded (the layout that is also tried with a padded vocabulary). Each layout
leaves out/<name>.safetensors (exported weights, both ways of starting, and log-probs) and the checkpoint out/<name>.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from actor_ranks import exported, read_sequences
from safetensors.torch import save_file

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.megatron_weights import MegatronWeights
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.mcore import dist_checkpointing, ensure_metadata_has_dp_cp_group
from parallel.optimizer_settings import OptimizerSettings

SETTINGS = ActorSettings(
    dtype=torch.float32,
    recompute="none",
    max_tokens_per_micro_batch=400,
    logprob_chunk_tokens=16,
    temperature=1.0,
    optimizer=OptimizerSettings(weight_decay=0.1, betas=[0.9, 0.98], eps=1e-4, gradient_clip=0.5),
    megatron_options={},
)


def run(request: dict, name: str) -> None:
    fixture, converted, out = (Path(request[key]) for key in ("fixture", "converted", "out"))
    layout = ParallelLayout(**request["layouts"][name])
    groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=90)
    architecture = read_architecture(fixture)
    results = {}
    if name == request["padded"]:  # Megatron's usual padding of the vocabulary, to a multiple of 128
        padded = MegatronActor(dataclasses.replace(architecture, vocab_size=128), layout, groups, detect(), SETTINGS)
        padded.load_model(converted)
        results |= {f"padded.{key}": tensor for key, tensor in exported(padded).items()}
        save(padded, out / f"{name}_padded", groups)
    actor = MegatronActor(architecture, layout, groups, detect(), SETTINGS)
    actor.load_model(converted)
    load_as_transformer_engine_would(actor, converted)
    results |= {f"loaded.{key}": tensor for key, tensor in exported(actor).items()}
    other = MegatronActor(architecture, layout, groups, detect(), SETTINGS)
    with MegatronWeights(converted, architecture) as weights:
        other.load_hugging_face(weights.read)
    results |= {f"read.{key}": tensor for key, tensor in exported(other).items()}
    results |= {f"logprobs.{i}": each.clone() for i, each in enumerate(actor.logprobs(read_sequences(fixture)))}
    save(actor, out / name, groups)
    if groups.coordinates.rank == 0:
        save_file({key: tensor.contiguous() for key, tensor in results.items()}, out / f"{name}.safetensors")
    process_groups.shut_down()


def save(actor: MegatronActor, path: Path, groups: process_groups.ProcessGroups) -> None:
    if groups.coordinates.rank == 0:
        path.mkdir(parents=True)
    torch.distributed.barrier()
    actor.save(path)


def load_as_transformer_engine_would(actor: MegatronActor, converted: Path) -> None:
    """Ask for the keys that TransformerEngine's layer spec asks for, this rank's share, strictly; the norm must be the one under its
    other name. TransformerEngine itself needs CUDA; the keys are those of its modules' sharded_state_dict in megatron-core 0.16.1."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    layers, experts = actor.architecture.num_hidden_layers, actor.architecture.num_experts
    module = actor._modules[0]
    sharded = module.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({"singleton_local_shards": False}))
    asked, expected = {}, {}
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    for name, tensor in sharded.items():
        if isinstance(tensor, ShardedTensor) and tensor.key == norm and experts is not None:
            expected[name] = tensor.data.clone()
            asked[name] = dataclasses.replace(tensor, key="decoder.layers.pre_mlp_layernorm.weight", data=torch.zeros_like(tensor.data))
    modules = ["self_attention.linear_proj", "self_attention.linear_qkv", "self_attention.core_attention"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"] if experts is None else ["pre_mlp_layernorm"]
    objects = [(f"decoder.layers.{each}._extra_state", (layers,), (layer,)) for each in modules for layer in range(layers)]
    for each in ("linear_fc1", "linear_fc2"):
        key = f"decoder.layers.mlp.experts.experts.{each}._extra_state"
        objects += [(key, (layers, experts), (layer, expert)) for layer in range(layers) for expert in range(experts or 0)]
    objects.append(("decoder.final_layernorm._extra_state", (1,), (0,)))
    for key, shape, offset in objects:
        asked[f"{key} {offset}"] = ShardedObject(key, None, shape, offset)
    strict = dist_checkpointing.validation.StrictHandling.RAISE_UNEXPECTED
    found = dist_checkpointing.load(asked, str(converted), strict=strict, validate_access_integrity=False)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(found[f"{key} {offset}"] is None for key, _, offset in objects)


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for name, port in zip(request["layouts"], request["ports"], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        run(request, name)


if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file again
    main()
