"""ModelShape: the sizes that decide memory and time, whatever the model is called; parameters and FLOPs follow by counting.

FLOPs are Megatron-Core's convention: products with weights and causal attention (half the square), forward and backward; the embedding
look-up, norms, rotary embedding, the router and whatever is computed twice do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_config import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of an attention block: `split` over tensor-parallel ranks or held whole by each. Vectors have one row."""

    rows: int
    columns: int
    split: bool

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of `num_layers` layers, the first `num_dense_layers` with a dense feed-forward part and the rest with experts.

    attention: an attention block's parameters in the order in which Megatron's module lists them. qk_dim, v_dim: per head, in the core.
    mtp_layers: extra layers that predict further tokens, each with its own pass through the head (DeepSeek-V3).
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    attention: tuple[Weight, ...]
    dense_ffn: int
    num_dense_layers: int
    num_experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    mtp_layers: int
    tied: bool
    max_positions: int

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def query_width(self) -> int:
        return self.num_heads * self.qk_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.qk_dim

    @property
    def attention_matmuls(self) -> int:
        """Weights of one attention block that are matrices."""
        return sum(weight.numel for weight in self.attention if weight.rows > 1)

    @property
    def expert_parameters(self) -> int:
        """Of all routed experts, in all layers and in extra-token layers."""
        moe_layers = self.num_layers - self.num_dense_layers + self.mtp_layers
        return moe_layers * self.num_experts * 3 * self.hidden_size * self.expert_ffn if self.is_moe else 0

    @property
    def total_parameters(self) -> int:
        """Of the whole model, extra-token layers included."""
        layers = self.num_layers + self.mtp_layers
        attention = sum(weight.numel for weight in self.attention) + 2 * self.hidden_size
        dense = self.num_dense_layers * 3 * self.hidden_size * self.dense_ffn
        moe = (layers - self.num_dense_layers) * self.hidden_size * (self.num_experts + 3 * self.shared_ffn)
        ends = self.vocab_size * self.hidden_size * (1 if self.tied else 2) + self.hidden_size
        extra = self.mtp_layers * (2 * self.hidden_size**2 + 3 * self.hidden_size)
        return layers * attention + dense + moe + self.expert_parameters + ends + extra

    def flops_per_token(self, sequence_length: float) -> float:
        """Forward and backward, causal, mean over the tokens of a sequence of this length."""
        layers = self.num_layers + self.mtp_layers
        matmuls = layers * self.attention_matmuls + self.num_dense_layers * 3 * self.hidden_size * self.dense_ffn
        matmuls += (layers - self.num_dense_layers) * 3 * self.hidden_size * (self.top_k * self.expert_ffn + self.shared_ffn)
        matmuls += (1 + self.mtp_layers) * self.vocab_size * self.hidden_size + self.mtp_layers * 2 * self.hidden_size**2
        core = layers * self.num_heads * (self.qk_dim + self.v_dim) * sequence_length  # 2 FLOPs x half the square
        return 3 * (2 * matmuls + core)


def from_architecture(architecture: Architecture, *, name: str) -> ModelShape:
    """The shape of a Qwen3 or Qwen3-MoE model."""
    a = architecture
    query, key = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    return ModelShape(
        name=name,
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        num_layers=a.num_hidden_layers,
        num_heads=a.num_attention_heads,
        num_kv_heads=a.num_key_value_heads,
        qk_dim=a.head_dim,
        v_dim=a.head_dim,
        attention=(
            Weight(rows=a.hidden_size, columns=query, split=True),
            Weight(rows=query + 2 * key, columns=a.hidden_size, split=True),
            Weight(rows=1, columns=a.head_dim, split=False),
            Weight(rows=1, columns=a.head_dim, split=False),
        ),
        dense_ffn=a.intermediate_size,
        num_dense_layers=0 if a.is_moe else a.num_hidden_layers,
        num_experts=a.num_experts or 0,
        top_k=a.num_experts_per_tok or 0,
        expert_ffn=a.moe_intermediate_size or 0,
        shared_ffn=0,
        mtp_layers=0,
        tied=a.tie_word_embeddings,
        max_positions=a.max_position_embeddings,
    )


def from_config(config: Mapping[str, Any], *, name: str, source: str | Path) -> ModelShape:
    """The shape that a Hugging Face config.json describes: Qwen3, Qwen3-MoE, and (to be planned, not trained) DeepSeek-V3.

    Raises ValueError as Architecture.from_config does, and for a key that DeepSeek-V3 needs and the file lacks.
    """
    if config.get("model_type") != "deepseek_v3":
        return from_architecture(Architecture.from_config(config, source=source), name=name)

    def size(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{source}: {key} is {value!r}; expected a whole number")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    nope, rope, v_dim = size("qk_nope_head_dim"), size("qk_rope_head_dim"), size("v_head_dim")
    q_rank, kv_rank = size("q_lora_rank"), size("kv_lora_rank")
    return ModelShape(
        name=name,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        qk_dim=nope + rope,
        v_dim=v_dim,
        attention=(
            Weight(rows=hidden, columns=heads * v_dim, split=True),
            Weight(rows=q_rank, columns=hidden, split=False),
            Weight(rows=heads * (nope + rope), columns=q_rank, split=True),
            Weight(rows=kv_rank + rope, columns=hidden, split=False),
            Weight(rows=heads * (nope + v_dim), columns=kv_rank, split=True),
            Weight(rows=1, columns=q_rank, split=False),
            Weight(rows=1, columns=kv_rank, split=False),
        ),
        dense_ffn=size("intermediate_size"),
        num_dense_layers=size("first_k_dense_replace"),
        num_experts=size("n_routed_experts"),
        top_k=size("num_experts_per_tok"),
        expert_ffn=size("moe_intermediate_size"),
        shared_ffn=size("n_shared_experts") * size("moe_intermediate_size"),
        mtp_layers=size("num_nextn_predict_layers"),
        tied=bool(config["tie_word_embeddings"]),
        max_positions=size("max_position_embeddings"),
    )
