"""Qwen3 and Qwen3-MoE written down plainly: the definition of the log-probs that an actor must compute, whatever its layout and layers.

Weights are Hugging Face tensors that come as a stream, one layer after the other, so only one layer is held at a time. Nothing here is
shared with the actor: no Megatron-Core, no packing, no fused weight.
"""

# Shapes: T tokens of one sequence, H hidden, N query heads, K key-value heads, D head_dim, E experts, V vocabulary.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints_convert.mapping import Architecture

_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYERS = "model.layers."
_VOCABULARY_ROWS = 16384  # of the head at a time: in float64 a large head would be the largest tensor here


def plain_logprobs(
    tensors: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    sequences: Sequence[Tensor],
    *,
    temperature: float,
    dtypes: Sequence[torch.dtype],
) -> list[list[Tensor]]:
    """Log-probs of the tokens of whole sequences, by one forward pass in each dtype over one stream of weights.

    Args:
        tensors: Hugging Face names and tensors: the embedding, all of layer 0, all of layer 1, ..., then the rest.
        architecture: the model they are of.
        sequences: int64 [T] each, T at least 2.
        temperature: logits are divided by it.
        dtypes: the arithmetic of each pass; float64 tells what the others round.

    Returns:
        For each dtype, for each sequence: float64 [T - 1] on the CPU, entry p for token p + 1.

    Raises:
        ValueError: a layer comes twice, or a tensor is missing.
    """
    groups = _by_layer(tensors)
    _, first = next(groups)
    embedding = first.pop(_EMBEDDING)
    passes = [_Pass(architecture, sequences, embedding, dtype) for dtype in dtypes]
    number = 0
    rest = first
    for layer, weights in groups:
        if layer is None:
            rest |= weights
            continue
        if layer != number:
            raise ValueError(f"weights of layer {layer} came where layer {number} was expected")
        for one in passes:
            one.layer(weights)
        number += 1
    if number != architecture.num_hidden_layers:
        raise ValueError(f"weights of {number} layers came, expected {architecture.num_hidden_layers}")
    head = embedding if architecture.tie_word_embeddings else rest[_HEAD]
    return [one.logprobs(rest[_FINAL_NORM], head, temperature=temperature) for one in passes]


def _by_layer(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """(layer, its tensors by the name inside the layer); layer None for what belongs to none, by its whole name."""
    for layer, group in groupby(tensors, key=lambda item: _layer_of(item[0])):
        beginning = "" if layer is None else f"{_LAYERS}{layer}."
        yield layer, {name.removeprefix(beginning): tensor for name, tensor in group}


def _layer_of(name: str) -> int | None:
    return int(name.removeprefix(_LAYERS).partition(".")[0]) if name.startswith(_LAYERS) else None


class _Pass:
    """One forward pass: the hidden states of all sequences, after as many layers as have come."""

    def __init__(self, architecture: Architecture, sequences: Sequence[Tensor], embedding: Tensor, dtype: torch.dtype) -> None:
        self._a = architecture
        self._dtype = dtype
        self._sequences = [sequence.to(embedding.device) for sequence in sequences]
        self._hidden = [embedding[token_ids].to(dtype) for token_ids in self._sequences]

    def layer(self, weights: Mapping[str, Tensor]) -> None:
        """Apply one decoder layer. weights: by the name inside the layer."""
        for index, hidden_TH in enumerate(self._hidden):
            attended_TH = self._attention(self._norm(hidden_TH, weights["input_layernorm.weight"]), weights)
            hidden_TH = hidden_TH + attended_TH
            mixed_TH = self._norm(hidden_TH, weights["post_attention_layernorm.weight"])
            mlp = self._experts if self._a.is_moe else self._dense
            self._hidden[index] = hidden_TH + mlp(mixed_TH, weights)

    def logprobs(self, norm: Tensor, head: Tensor, *, temperature: float) -> list[Tensor]:
        """Log-probs of each sequence's tokens after the first."""
        found = []
        for token_ids, hidden_TH in zip(self._sequences, self._hidden, strict=True):
            final_TH = self._norm(hidden_TH[:-1], norm)
            chosen_T = torch.empty(len(final_TH), dtype=torch.float64, device=head.device)
            parts: list[Tensor] = []
            for start in range(0, len(head), _VOCABULARY_ROWS):
                logits_TV = self._times(final_TH, head[start : start + _VOCABULARY_ROWS]).double() / temperature
                parts.append(logits_TV.logsumexp(-1))
                inside = (token_ids[1:] >= start) & (token_ids[1:] < start + _VOCABULARY_ROWS)
                chosen_T[inside] = logits_TV[inside].gather(1, token_ids[1:][inside, None] - start)[:, 0]
            found.append((chosen_T - torch.stack(parts).logsumexp(0)).cpu())
        return found

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(self._dtype))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last axis (Zhang & Sennrich, arXiv:1910.07467), at least in float32."""
        wide = x.to(_at_least_float32(self._dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._a.rms_norm_eps)
        return normed.to(self._dtype) * weight.to(self._dtype)

    def _attention(self, x_TH: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        heads, groups, head_dim = self._a.num_attention_heads, self._a.num_key_value_heads, self._a.head_dim
        query_TND = self._times(x_TH, weights["self_attn.q_proj.weight"]).view(-1, heads, head_dim)
        key_TKD = self._times(x_TH, weights["self_attn.k_proj.weight"]).view(-1, groups, head_dim)
        value_TKD = self._times(x_TH, weights["self_attn.v_proj.weight"]).view(-1, groups, head_dim)
        query_TND = self._rotate(self._norm(query_TND, weights["self_attn.q_norm.weight"]))
        key_TKD = self._rotate(self._norm(key_TKD, weights["self_attn.k_norm.weight"]))
        key_TND, value_TND = (x.repeat_interleave(heads // groups, dim=1) for x in (key_TKD, value_TKD))
        scores_NTT = torch.einsum("tnd,snd->nts", query_TND, key_TND) / head_dim**0.5
        future_TT = torch.ones(len(x_TH), len(x_TH), dtype=torch.bool, device=x_TH.device).triu(1)
        scores_NTT = scores_NTT.to(_at_least_float32(self._dtype)).masked_fill(future_TT, float("-inf"))
        out_TND = torch.einsum("nts,snd->tnd", scores_NTT.softmax(-1).to(self._dtype), value_TND)
        return self._times(out_TND.reshape(len(x_TH), -1), weights["self_attn.o_proj.weight"])

    def _rotate(self, x_TND: Tensor) -> Tensor:
        """Rotary embedding (Su et al., arXiv:2104.09864): channel i and channel i + D/2 are one pair."""
        half = self._a.head_dim // 2
        wide = torch.float64
        frequency = self._a.rope_theta ** (-torch.arange(half, dtype=wide, device=x_TND.device) / half)
        angle = torch.arange(len(x_TND), dtype=wide, device=x_TND.device)[:, None, None] * frequency
        cos, sin = angle.cos().to(self._dtype), angle.sin().to(self._dtype)
        first, second = x_TND[..., :half], x_TND[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _gated(self, x: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
        gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return self._times(F.silu(self._times(x, gate)) * self._times(x, up), down)

    def _dense(self, x_TH: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return self._gated(x_TH, weights, "mlp")

    def _experts(self, x_TH: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Each token visits its most probable experts; their outputs are weighted with the router's probabilities."""
        assert self._a.num_experts is not None and self._a.num_experts_per_tok is not None
        probs_TE = self._times(x_TH, weights["mlp.gate.weight"]).to(_at_least_float32(self._dtype)).softmax(-1)
        weight_T2, chosen_T2 = probs_TE.topk(self._a.num_experts_per_tok, dim=-1)
        if self._a.norm_topk_prob:
            weight_T2 = weight_T2 / weight_T2.sum(-1, keepdim=True)
        out_TH = torch.zeros_like(x_TH)
        for expert in chosen_T2.unique().tolist():
            tokens, places = (chosen_T2 == expert).nonzero(as_tuple=True)
            result = self._gated(x_TH[tokens], weights, f"mlp.experts.{expert}")
            out_TH.index_add_(0, tokens, result * weight_T2[tokens, places, None].to(self._dtype))
        return out_TH


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
