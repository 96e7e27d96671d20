"""What other ranks would hand over where this one hands over a Python object."""

from __future__ import annotations

import re
from typing import Any

from checkpoints_convert.hf_config import Architecture
from parallel.layout import ParallelLayout

_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_EMBEDDING, _LAST_NORM, _HEAD = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"


def answer_of(obj: Any, rank: int, *, me: int, architecture: Architecture, layout: ParallelLayout) -> Any:
    """Names of parameters become those that the other rank holds; anything else is handed back as it is."""
    if not (isinstance(obj, list) and obj and all(isinstance(name, str) for name in obj) and any(map(_LAYER.search, obj))):
        return obj
    here, there = layout.coordinates(me), layout.coordinates(rank)
    expert_offset = (there.ep - here.ep) * (architecture.num_experts // layout.ep) if architecture.num_experts is not None else 0
    chunks = layout.chunks_of_rank(architecture.num_hidden_layers, there.pp)
    one = min(int(match[1]) for match in map(_LAYER.search, obj) if match)  # all layers hold the same
    names = [name for name in obj if (match := _LAYER.search(name)) and int(match[1]) == one]
    names = [_LAYER.sub(f"layers.{layer}.", name) for chunk in chunks for layer in range(chunk.first, chunk.last) for name in names]
    names = [_EXPERT.sub(lambda match: f"local_experts.{int(match[1]) + expert_offset}.", name) for name in names]
    if there.pp == 0:
        names.append(_EMBEDDING)
    if there.pp == layout.pp - 1:
        names.append(_LAST_NORM)
        if not architecture.tie_word_embeddings or layout.pp > 1:
            names.append(_HEAD)
    return names


def install() -> None:
    """For the rest of the process: Megatron does not check whether all ranks together write every part of a checkpoint once."""
    from megatron.core.dist_checkpointing import state_dict_utils

    state_dict_utils.validate_sharding_integrity = lambda *_, **__: None
