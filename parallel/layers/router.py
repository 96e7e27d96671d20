"""Megatron-Core's router with a balance loss that does not depend on the layout.

Megatron's own auxiliary losses speak of the tokens that happen to lie in one micro-batch, and count on a division by token counts that this
actor does not make (its loss carries its denominator). Here each sequence has a loss of its own, as in DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layers.attention import ShardedPackedSeqParams
from parallel.mcore import MoEAuxLossAutoScaler, TopKRouter


def check_router_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a balance loss that would depend on the layout, or do nothing. megatron_options.py refuses whole options."""
    dtype = options.get("moe_router_dtype")
    if dtype not in (None, "fp32", "fp64"):  # Megatron-Core takes any other word for null
        raise ValueError(f"megatron.moe_router_dtype = {dtype!r}: expected fp32, fp64 or null (the model's dtype)")
    kind, coefficient = options.get("moe_router_load_balancing_type", "none"), options.get("moe_aux_loss_coeff", 0.0)
    if kind not in ("none", "seq_aux_loss"):
        raise ValueError(
            f"megatron.moe_router_load_balancing_type = {kind!r}: expected none or seq_aux_loss (one loss per sequence); "
            "the others change with the way tokens are packed into micro-batches"
        )
    if (kind == "none") != (coefficient == 0.0):
        raise ValueError(
            f"megatron.moe_aux_loss_coeff = {coefficient!r} with moe_router_load_balancing_type = {kind!r}: "
            "expected both, seq_aux_loss and a coefficient, or neither"
        )
    if kind != "none" and (options.get("moe_layer_recompute") or "moe" in (options.get("recompute_modules") or ())):
        # It would be recomputed by itself, at a time when its layer may have gone on to another micro-batch.
        raise ValueError("megatron.recompute_modules holds 'moe', which cannot be recomputed together with seq_aux_loss; remove one")


def sequence_balance_loss(
    probs_TE: Tensor, chosen_SE: Tensor, sequence_id_T: Tensor, lengths_S: Tensor, weights_S: Tensor, *, experts_per_token: int
) -> Tensor:
    """Weighted sum over sequences of E * sum_e f_e P_e, as far as the given tokens contribute to P: -> scalar.

    f_e: share of a sequence's expert choices that fell on e, chosen_SE / (experts_per_token * lengths_S), without gradient. P_e: mean
    router probability of e over the sequence. Perfect balance gives 1 for each sequence. probs_TE: softmax over all experts, 0 at padding.
    Source: DeepSeek-V3 (arXiv:2412.19437), eq. 17 to 20, with a softmax for its normalised sigmoid.
    """
    num_experts = probs_TE.size(1)
    share_SE = chosen_SE / (experts_per_token * lengths_S[:, None])
    return num_experts * (probs_TE * (share_SE * (weights_S / lengths_S)[:, None])[sequence_id_T]).sum()


class SequenceBalancedRouter(TopKRouter):
    """With moe_router_load_balancing_type=seq_aux_loss and a coefficient c, the mini-batch's loss gains, for every layer,

        c * mean over all sequences of the mini-batch of (E * sum_e f_e P_e of that sequence, all positions, prompt and response).

    The mean has a global denominator, so neither packing nor any layout changes it: choices are counted over the ranks that share a
    sequence, each rank adds its own tokens' part, and gradients are summed over ranks as always.
    """

    packed: ShardedPackedSeqParams | None = None  # the micro-batch in hand, None between two; see `follow_packing`

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, seq_length: int, bsz: int, with_padding_mask: bool = False
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        packed = self.packed
        assert packed is not None and packed.shard is not None
        if coefficient == 0:
            return probs
        shard = packed.shard
        sequence_id_T, padding_T = shard.sequence_id_T, shard.padding_T
        if self.config.sequence_parallel:
            group = self.tp_group
            sequence_id_T, padding_T = (x.chunk(group.size())[group.rank()] for x in (sequence_id_T, padding_T))
        known = torch.tensor([shard.lengths, packed.sequence_weights], dtype=torch.float32)
        lengths_S, weights_S = known.to(probs.device, non_blocking=True)
        real_T1 = ~padding_T[:, None]
        chosen_SE = torch.zeros(len(lengths_S), routing_map.size(1), device=probs.device)
        chosen_SE.index_add_(0, sequence_id_T, (routing_map & real_T1).float())
        dist.all_reduce(chosen_SE, group=self.tp_cp_group)
        loss = sequence_balance_loss(
            scores_for_aux_loss * real_T1, chosen_SE, sequence_id_T, lengths_S, weights_S, experts_per_token=self.config.moe_router_topk
        )
        return MoEAuxLossAutoScaler.apply(probs, coefficient * loss)


class RowChoice:
    """Which experts a router's tokens visit. Stands where Megatron-Core would put its own RouterReplay; see routing_replay.py."""

    layer_number: int | None = None  # Megatron-Core's router writes it from 0.17 on

    def __init__(self, router: SequenceBalancedRouter) -> None:
        self._router = router

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any = None, group_topk: Any = None, default_compute_topk: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of the chosen experts, [T, topk] each; Megatron-Core's signature."""
        own_scores, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        packed = self._router.packed
        if packed is None or packed.routing is None:
            return own_scores, own
        layer = self._router.layer_number - 1
        if packed.routing.records:
            packed.routing.record(layer, own)
            return own_scores, own
        chosen = packed.routing.choose(layer, own)
        return scores.gather(1, chosen), chosen


def routed_layers(modules: Iterable[torch.nn.Module]) -> list[int]:
    """Numbers, from 0, of the layers inside that have a router."""
    return sorted(router.layer_number - 1 for module in modules for router in module.modules() if isinstance(router, TopKRouter))


def follow_packing(module: torch.nn.Module) -> None:
    """Let every router inside know the micro-batch that its layer is working on, also when the layer is recomputed."""
    for layer in module.modules():
        router = getattr(getattr(layer, "mlp", None), "router", None)
        if isinstance(router, SequenceBalancedRouter):
            layer.register_forward_pre_hook(_hand_over, with_kwargs=True)
            layer.register_forward_hook(_take_back)
            router.router_replay = RowChoice(router)


def _hand_over(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer.mlp.router.packed = kwargs["packed_seq_params"]


def _take_back(layer: Any, *_: Any) -> None:
    layer.mlp.router.packed = None
    # Megatron's dispatcher keeps the router's output until the next micro-batch, and with its graph the layer's input and its gradient.
    layer.mlp.token_dispatcher.probs = layer.mlp.token_dispatcher.local_probs = None  # of the alltoall and of the allgather dispatcher
