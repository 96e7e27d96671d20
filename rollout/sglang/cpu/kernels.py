"""Plain-torch stand-ins for what SGLang does sequence by sequence, or with GPU kernels, on its CPU path. No SGLang in here.

SGLang's torch-native attention loops over the sequences of a batch; for small models that loop is most of a decode step.
Here a batch is gathered, padded to its longest sequence, and attended to at once.
"""

# Shapes: N sequences, Q query tokens of all sequences, L longest sequence, H query heads, K key heads, G = H / K, D head size,
# V vocabulary, B blocks of b tokens; n, q: those of one chunk.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DRAW_BLOCK = 256  # tokens
MAX_GATHERED_NUMBERS = 2**24  # per chunk of sequences: 64 MB in float32


def decode_attention(
    query_NHD: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices_N: Tensor,
    seq_lens_N: Tensor,
    scaling: float,
) -> Tensor:
    """Attention of one new token per sequence to all tokens of its sequence (itself included): [N, H, D] -> [N, H, Dv].

    k_cache, v_cache: [slots, K, D]. req_to_token: [requests, context], slot of every token of a request; beyond a request's length
    it may hold anything that is a slot.
    """
    num_kv_heads = k_cache.shape[1]
    outputs = []
    longest = int(seq_lens_N.max())
    for part in _chunks(len(seq_lens_N), longest * num_kv_heads * k_cache.shape[2]):
        lengths_n = seq_lens_N[part]
        longest_here = int(lengths_n.max())
        slots_nL = req_to_token[req_pool_indices_N[part], :longest_here]
        # The G query heads that share a key head stand where query positions usually stand, so no key is repeated.
        query_nKGD = query_NHD[part].unflatten(1, (num_kv_heads, -1))
        seen_nL = torch.arange(longest_here, device=lengths_n.device) < lengths_n[:, None]
        output_nKGD = scaled_dot_product_attention(
            query_nKGD,
            _gather(k_cache, slots_nL, query_NHD.dtype),
            _gather(v_cache, slots_nL, query_NHD.dtype),
            attn_mask=seen_nL[:, None, None, :],
            scale=scaling,
        )
        outputs.append(output_nKGD.flatten(1, 2))
    return torch.cat(outputs)


def extend_attention(
    query_QHD: Tensor,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices_N: Tensor,
    seq_lens_N: Tensor,
    prefix_lens_N: Tensor,
    extend_lens_N: Tensor,
    scaling: float,
) -> Tensor:
    """Causal attention of the new tokens of each sequence, which follow `prefix_lens` known ones: [Q, H, D] -> [Q, H, Dv].

    seq_lens = prefix_lens + extend_lens; queries are packed one sequence after the other. Other arguments as in `decode_attention`.
    """
    device = query_QHD.device
    starts = [0, *torch.cumsum(extend_lens_N, 0).tolist()]
    outputs = []
    longest, longest_query = int(seq_lens_N.max()), int(extend_lens_N.max())
    num_heads, head_size = query_QHD.shape[1:]
    for part in _chunks(len(seq_lens_N), longest * (longest_query + 2 * num_heads * head_size)):
        prefix_n, extend_n, lengths_n = prefix_lens_N[part], extend_lens_N[part], seq_lens_N[part]
        num_here, longest_here, queries_here = len(extend_n), int(lengths_n.max()), int(extend_n.max())
        position_q = torch.arange(queries_here, device=device)
        real_nq = position_q < extend_n[:, None]
        query_nqHD = query_QHD.new_zeros(num_here, queries_here, num_heads, head_size)
        query_nqHD[real_nq] = query_QHD[starts[part.start] : starts[part.start + num_here]]
        slots_nL = req_to_token[req_pool_indices_N[part], :longest_here]
        position_L = torch.arange(longest_here, device=device)
        # A padding query sees position 0, so that its softmax (thrown away) is not over nothing.
        seen_nqL = position_L <= (prefix_n[:, None] + position_q)[:, :, None]
        output_nHqD = scaled_dot_product_attention(
            query_nqHD.transpose(1, 2),
            _gather(k_cache, slots_nL, query_QHD.dtype),
            _gather(v_cache, slots_nL, query_QHD.dtype),
            attn_mask=seen_nqL[:, None],
            scale=scaling,
            enable_gqa=k_cache.shape[1] != num_heads,
        )
        outputs.append(output_nHqD.transpose(1, 2)[real_nq])
    return torch.cat(outputs)


def _gather(cache: Tensor, slots_nL: Tensor, dtype: torch.dtype) -> Tensor:
    """[slots, K, D] -> [n, K, L, D]. index_select copies whole rows: a tenth of the time of an index in brackets."""
    rows = cache.flatten(1).index_select(0, slots_nL.flatten())
    return rows.view(*slots_nL.shape, *cache.shape[1:]).transpose(1, 2).to(dtype)


def _chunks(num_sequences: int, numbers_per_sequence: int) -> list[slice]:
    size = max(1, MAX_GATHERED_NUMBERS // max(1, numbers_per_sequence))
    return [slice(start, min(start + size, num_sequences)) for start in range(0, num_sequences, size)]


def seeded_uniform(seed_N: Tensor, position_N: Tensor) -> Tensor:
    """One number in [0, 1) per row, a function of the row's seed and token position alone: int64 [N], [N] -> float64 [N].

    32 bits of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), seeded by both.
    """
    with np.errstate(over="ignore"):
        state = seed_N.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + position_N.numpy().astype(np.uint64)
        for _ in range(2):  # twice: neighbouring positions must not give related numbers
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(32)).astype(np.float64) / 2**32)


def seeded_multinomial(weights_NV: Tensor, seed_N: Tensor, position_N: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution: [N, V], [N], [N] -> int64 [N, 1].

    weights: probabilities, 0 for excluded tokens, need not be normalised. The draw depends on the row, its seed and its position,
    not on the rest of the batch. An excluded token is never drawn.
    """
    # First the block of tokens, then the token in it: one sum over a large vocabulary instead of a running one, ten times as fast.
    num_blocks = -(-weights_NV.shape[1] // DRAW_BLOCK)
    padded_NV = torch.nn.functional.pad(weights_NV, (0, num_blocks * DRAW_BLOCK - weights_NV.shape[1]))
    blocks_NBb = padded_NV.unflatten(1, (num_blocks, DRAW_BLOCK))
    before_NB = blocks_NBb.sum(-1, dtype=torch.float64).cumsum(-1)
    target_N1 = seeded_uniform(seed_N, position_N)[:, None] * before_NB[:, -1:]
    # right=True: the first whose cumulative weight EXCEEDS the target; one of weight 0 never does so first.
    block_N1 = torch.searchsorted(before_NB, target_N1, right=True)
    skipped_N1 = torch.nn.functional.pad(before_NB, (1, 0)).gather(1, block_N1)
    inside_Nb = blocks_NBb[torch.arange(len(block_N1)), block_N1[:, 0]].double().cumsum(-1)
    # The block's sum and its running sum round differently; without the bound a target at the very end could fall outside.
    rest_N1 = torch.minimum(target_N1 - skipped_N1, inside_Nb[:, -1:] * (1 - 2**-40))
    return block_N1 * DRAW_BLOCK + torch.searchsorted(inside_Nb, rest_N1, right=True)
