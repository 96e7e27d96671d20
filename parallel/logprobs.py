"""Log-probabilities and entropies of chosen tokens from hidden states, without ever holding [tokens, vocabulary].

The output projection, softmax and selection run over a chunk of tokens at a time and the backward pass computes the logits again. Under
tensor parallelism each rank holds a block of the vocabulary's rows; three numbers per token are exchanged in forward (two collectives in
all, whatever the number of chunks) and nothing in backward.

Shapes: T tokens, H hidden, V this rank's vocabulary rows, c tokens of one chunk, L labels of one token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of a bf16 weight that are widened to fp32 at a time where the device has no bf16 product with an fp32 result.
_WIDENED_ROWS = 8192
# Vocabulary entries whose exponentials are held at a time, beside the logits.
_EXPONENTIALS = 8192


def token_logprobs(
    hidden_TH: Float[Tensor, "T H"],
    weight_VH: Float[Tensor, "V H"],
    labels: Int64[Tensor, "T ..."],
    *,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Float32[Tensor, "T ..."], Float32[Tensor, " T"] | None]:
    """log softmax(hidden @ weight.T / temperature)[label] and the entropy of the same distribution, natural log.

    Several labels of one token share one softmax: what they cost is memory, [T, L].

    hidden_TH: every token on every rank of `tp_group` (gathered under sequence parallelism). weight_VH: this rank's rows, rank r holding
        rows [r * V, (r + 1) * V) of the vocabulary; both fp32, or both bf16. labels: int64 global token ids, [T] or [T, L]; each must be
        in [0, vocab_size), padding included. Labels after the first must differ from each other, or CUDA adds their gradients in any order.
    vocab_size: true size; rows at and beyond it (padding of the embedding) have probability 0 and gradient 0.
    tp_group: None, or a group of one: no collective.
    chunk_tokens: tokens whose [c, V] fp32 logits are held at a time, in one buffer that all chunks share.
    -> (logprobs fp32 in the shape of labels, with gradient, entropy fp32 [T] without, or None if not with_entropy).

    Logits, softmax and weight gradient are accumulated in fp32 also for bf16 inputs: near -5 neighbouring bf16 log-probs differ by 0.03. In
    backward the gradient of the logits is rounded to the inputs' dtype before the two products, as mixed precision does everywhere.
    The gradient of hidden_TH is this rank's share: summing it over `tp_group` is the caller's (Megatron's copy or gather region does it).
    Raises ValueError for disagreeing shapes and dtypes, a label outside the vocabulary, temperature <= 0 or chunk_tokens < 1.
    """
    _check_shapes(hidden_TH, weight_VH, labels)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    tp_rank = 0 if tp_group is None else dist.get_rank(tp_group)
    if not 1 <= vocab_size <= tp_size * len(weight_VH):
        raise ValueError(
            f"vocab_size is {vocab_size}; {tp_size} ranks with {len(weight_VH)} rows each hold 1 to {tp_size * len(weight_VH)}"
        )
    if labels.numel():
        smallest, largest = (int(x) for x in torch.stack(labels.aminmax()).tolist())
        if smallest < 0 or largest >= vocab_size:
            raise ValueError(f"labels spans {smallest} to {largest}; expected token ids in [0, {vocab_size})")

    first_row = tp_rank * len(weight_VH)
    num_rows = min(max(vocab_size - first_row, 0), len(weight_VH))
    labels_TL = labels if labels.dim() == 2 else labels[:, None]
    logprobs_TL, entropy_T = _TokenLogprobs.apply(
        hidden_TH,
        weight_VH,
        labels_TL - first_row,
        num_rows,
        float(temperature),
        tp_group if tp_size > 1 else None,
        chunk_tokens,
        with_entropy,
    )
    return logprobs_TL.view(labels.shape), entropy_T


def _check_shapes(hidden_TH: Tensor, weight_VH: Tensor, labels: Tensor) -> None:
    matrices = hidden_TH.dim() == weight_VH.dim() == 2 and hidden_TH.shape[1] == weight_VH.shape[1]
    if not matrices or labels.dim() not in (1, 2) or labels.shape[:1] != hidden_TH.shape[:1]:
        raise ValueError(
            f"expected hidden [T, H], weight [V, H] and labels [T] or [T, L]; "
            f"got {list(hidden_TH.shape)}, {list(weight_VH.shape)}, {list(labels.shape)}"
        )
    if hidden_TH.dtype != weight_VH.dtype or hidden_TH.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"hidden and weight must both be float32 or both bfloat16; got {hidden_TH.dtype} and {weight_VH.dtype}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")


class _TokenLogprobs(torch.autograd.Function):
    """Labels are relative to this rank's first row, so a label of another rank lies outside [0, num_rows)."""

    @staticmethod
    def forward(
        ctx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        local_labels_TL: Tensor,
        num_rows: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        used_VH = weight_VH[:num_rows]
        buffer_cV = _logits_buffer(hidden_TH, used_VH, chunk_tokens)
        parts = [
            _local_softmax_parts(hidden_cH, used_VH, labels_cL, temperature, with_entropy, buffer_cV)
            for hidden_cH, labels_cL in zip(hidden_TH.split(chunk_tokens), local_labels_TL.split(chunk_tokens), strict=True)
        ]
        max_T, sums_T2, logits_TL = (torch.cat(x) for x in zip(*parts, strict=True))
        if tp_group is not None:
            max_T, sums_T2, logits_TL = _combine(max_T, sums_T2, logits_TL, tp_group)
        exp_sum_T, weighted_sum_T = sums_T2.unbind(1)
        log_sum_T = max_T + exp_sum_T.log()

        ctx.save_for_backward(hidden_TH, weight_VH, local_labels_TL, log_sum_T)
        ctx.num_rows, ctx.temperature, ctx.chunk_tokens = num_rows, temperature, chunk_tokens
        # H = log sum exp(l) - E[l], with every logit measured from the maximum to keep the difference small.
        entropy_T = exp_sum_T.log() - weighted_sum_T / exp_sum_T if with_entropy else None
        if entropy_T is not None:
            ctx.mark_non_differentiable(entropy_T)
        return logits_TL - log_sum_T[:, None], entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TL: Tensor, _grad_entropy: Tensor | None):
        hidden_TH, weight_VH, local_labels_TL, log_sum_T = ctx.saved_tensors
        used_VH = weight_VH[: ctx.num_rows]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_TH = torch.empty_like(hidden_TH) if needs_hidden else None
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device) if needs_weight else None

        buffer_cV = _logits_buffer(hidden_TH, used_VH, ctx.chunk_tokens)
        for start in range(0, len(hidden_TH), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            hidden_cH, grad_cL = hidden_TH[rows], grad_TL[rows] / ctx.temperature
            grad_cV = _logits(hidden_cH, used_VH, ctx.temperature, buffer_cV)
            grad_cV.sub_(log_sum_T[rows, None]).exp_().mul_(-grad_cL.sum(1, keepdim=True))
            mine_cL, labels_cL = _own_labels(local_labels_TL[rows], ctx.num_rows)
            if ctx.num_rows:
                grad_cL = grad_cL * mine_cL  # a label of another rank adds 0 to row 0
                # The first one alone: it may be one of the others, and no two of a call may be the same where order must not count.
                for part in (slice(0, 1), slice(1, None)):
                    grad_cV.scatter_add_(1, labels_cL[:, part], grad_cL[:, part])
            grad_cV = grad_cV.to(hidden_TH.dtype)
            if grad_hidden_TH is not None:
                torch.mm(grad_cV, used_VH, out=grad_hidden_TH[rows])
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH[: ctx.num_rows], grad_cV.t(), hidden_cH)

        grad_weight = grad_weight_VH.to(weight_VH.dtype) if grad_weight_VH is not None else None
        return grad_hidden_TH, grad_weight, None, None, None, None, None, None


def _local_softmax_parts(
    hidden_cH: Tensor, weight_VH: Tensor, labels_cL: Tensor, temperature: float, with_entropy: bool, buffer_cV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's share of one chunk, fp32: the largest logit m [c]; sum exp(l - m) and sum exp(l - m) (l - m), [c, 2]; the labels' logits
    [c, L], 0 where they are another rank's. A rank without a single true row has m = -inf and zeros."""
    num_tokens = len(hidden_cH)
    if not len(weight_VH):
        zeros = hidden_cH.new_zeros(num_tokens, 2 + labels_cL.size(1), dtype=torch.float32)
        return zeros.new_full((num_tokens,), -torch.inf), zeros[:, :2], zeros[:, 2:]
    logits_cV = _logits(hidden_cH, weight_VH, temperature, buffer_cV)
    mine_cL, own_cL = _own_labels(labels_cL, len(weight_VH))
    label_logits_cL = torch.where(mine_cL, logits_cV.gather(1, own_cL), 0.0)
    max_c = logits_cV.amax(1)
    exp_sum_c, weighted_c = torch.zeros_like(max_c), torch.zeros_like(max_c)
    for part in logits_cV.split(_EXPONENTIALS, dim=1):
        shifted = part.sub_(max_c[:, None])
        exponentials = shifted.exp()
        exp_sum_c += exponentials.sum(1)
        if with_entropy:
            weighted_c += exponentials.mul_(shifted).sum(1)
    return max_c, torch.stack([exp_sum_c, weighted_c], 1), label_logits_cL


def _combine(max_T: Tensor, sums_T2: Tensor, logits_TL: Tensor, tp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Join the shares of all ranks: the maximum, sums re-expressed against it, and logits. Two collectives."""
    common_T = max_T.clone()
    dist.all_reduce(common_T, op=dist.ReduceOp.MAX, group=tp_group)
    exp_sum_T, weighted_sum_T = sums_T2.unbind(1)
    # A rank without rows has max -inf and sums 0; its shift must not become 0 * -inf.
    shift_T = torch.where(max_T == -torch.inf, 0.0, max_T - common_T)
    scale_T = shift_T.exp()
    of_sums = torch.stack([exp_sum_T * scale_T, (weighted_sum_T + exp_sum_T * shift_T) * scale_T], 1)
    summed = torch.cat([of_sums, logits_TL], 1)
    dist.all_reduce(summed, group=tp_group)
    return common_T, summed[:, :2], summed[:, 2:]


def _own_labels(labels: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in this rank's rows, and the labels with the others moved to row 0."""
    mine = (labels >= 0) & (labels < num_rows)
    return mine, labels.where(mine, 0)


def _logits_buffer(hidden_TH: Tensor, weight_VH: Tensor, chunk_tokens: int) -> Tensor:
    return torch.empty(min(chunk_tokens, len(hidden_TH)), len(weight_VH), dtype=torch.float32, device=hidden_TH.device)


def _logits(hidden_cH: Tensor, weight_VH: Tensor, temperature: float, buffer_cV: Tensor) -> Tensor:
    """hidden @ weight.T / temperature in fp32: the first rows of `buffer_cV`, written over."""
    logits_cV = buffer_cV[: len(hidden_cH)]
    if hidden_cH.dtype == torch.float32:
        torch.mm(hidden_cH, weight_VH.t(), out=logits_cV)
    elif hidden_cH.is_cuda:
        torch.mm(hidden_cH, weight_VH.t(), out_dtype=torch.float32, out=logits_cV)
    else:
        wide_cH = hidden_cH.float()
        for rows, out in zip(weight_VH.split(_WIDENED_ROWS), logits_cV.split(_WIDENED_ROWS, dim=1), strict=True):
            out.copy_(wide_cH @ rows.float().t())
    return logits_cV if temperature == 1.0 else logits_cV.div_(temperature)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with an fp32 total."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        for rows, a_rows in zip(total.split(_WIDENED_ROWS), a.split(_WIDENED_ROWS), strict=True):
            rows.add_(torch.mm(a_rows, b, out_dtype=torch.float32))
    else:
        wide_b = b.float()
        for rows, a_rows in zip(total.split(_WIDENED_ROWS), a.split(_WIDENED_ROWS), strict=True):
            rows.addmm_(a_rows.float(), wide_b)
