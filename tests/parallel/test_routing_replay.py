"""Which positions of which sequence a rank's router meets; what cannot be replayed. The replay itself is tested by test_actor.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from checkpoints_convert.hf_config import Architecture
from parallel.routing_replay import check_replay, local_runs
from parallel.sequence_shard import SequenceShard

MOE: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 16, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "max_position_embeddings": 64, "num_experts": 4},
}


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_the_runs_of_all_ranks_are_every_position_once_in_its_place(cp: int, tp: int) -> None:
    lengths = [19, 1, 7, 24, 2]
    numbered = [1000 * i + torch.arange(length) for i, length in enumerate(lengths)]
    met = []
    for rank in range(cp):
        shard = SequenceShard.zigzag(lengths, rank, cp, None, multiple_of=(2 * cp if cp > 1 else 1) * tp)
        held = shard.local(numbered, fill=-1).chunk(tp)
        for part in range(tp):
            seen = torch.full_like(held[part], -1)
            for run in local_runs(shard, part=part, parts=tp):
                seen[run.start : run.start + run.size] = numbered[run.number][run.position : run.position + run.size]
                met += seen[run.start : run.start + run.size].tolist()
            assert torch.equal(seen, held[part])
    assert sorted(met) == torch.cat(numbered).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moe_router_fusion": True}, "megatron.moe_router_fusion = True: the fused router chooses experts by itself"),
        ({"recompute_modules": ["core_attn", "moe"]}, "megatron.recompute_modules holds 'moe'"),
        ({"moe_layer_recompute": True}, "megatron.recompute_modules holds 'moe'"),
    ],
)
def test_what_would_not_ask_for_the_given_experts_is_refused(options: dict[str, Any], words: str) -> None:
    check_replay({"recompute_modules": ["core_attn", "moe_act"]}, Architecture.from_config(MOE, source="test"))
    with pytest.raises(ValueError, match=words):
        check_replay(options, Architecture.from_config(MOE, source="test"))
