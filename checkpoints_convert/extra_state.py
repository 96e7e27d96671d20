"""Keys of the `_extra_state` entries that a GPTModel looks for beside its tensors, under either layer spec. All of them are None here.

TransformerEngine keeps fp8 scales there; without fp8 they are empty, but a strict load misses them when they are absent. Megatron's
local modules register some of them too, so that checkpoints of both specs can be exchanged.
Source: make_sharded_object_for_checkpoint in megatron/core/transformer/utils.py (0.16.1): key/shard_<offsets>_<shape>, dots between axes.
"""

from __future__ import annotations

from collections.abc import Iterator

from checkpoints_convert.hf_config import Architecture

_EVERY_LAYER = (
    "self_attention.linear_qkv",  # local and TransformerEngine
    "self_attention.linear_proj",
    "self_attention.core_attention",  # TransformerEngine alone, as the rest of this table
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
_DENSE_LAYER = ("mlp.linear_fc1", "mlp.linear_fc2")
_MOE_LAYER = ("pre_mlp_layernorm",)
_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def extra_state_keys(architecture: Architecture) -> Iterator[str]:
    """All of them, each once. A spec that has no use for an entry does not ask for it."""
    layers, experts = architecture.num_hidden_layers, architecture.num_experts
    for layer in range(layers):
        for name in (*_EVERY_LAYER, *(_DENSE_LAYER if experts is None else _MOE_LAYER)):
            yield f"decoder.layers.{name}._extra_state/shard_{layer}_{layers}"
        for name in _EXPERT:
            for expert in range(experts or 0):
                yield f"decoder.layers.{name}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
