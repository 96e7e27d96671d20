"""The experts of one rank in one pass, where TransformerEngine is absent.

Tokens arrive sorted by expert, behind Megatron-Core's dispatcher. Parameters, their names and their checkpoint stay those of its
`SequentialMLP`; replaced is that module's forward, which calls two linear layers and an activation for each expert in turn.

Two ways to multiply, equal up to rounding; `capabilities.py` chooses. "loop": one product per expert, written where it belongs, and weight
gradients added straight to Megatron's gradient buffer: the faster one on a CPU, where torch's grouped product is a loop as well and wants
the weights stacked first. "grouped": torch's grouped product, one kernel for all experts on CUDA.

Shapes: T tokens routed to this rank's experts, E experts of this rank, I input and O output features, F features between the two layers
(this rank's share of them under expert tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel import weight_gradient
from parallel.mcore import SequentialMLP, TransformerConfig, weighted_bias_swiglu_impl

Product = Literal["loop", "grouped"]


class PackedExperts(SequentialMLP):
    """Drop-in `experts` of Megatron-Core's Mixture-of-Experts layer: SiLU-gated experts without bias."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, submodules: Any, *, product: Product, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection=pg_collection)
        self.product = product

    def forward(self, tokens_TI: Tensor, tokens_per_expert_E: Tensor, probs_T: Tensor) -> tuple[Tensor, None]:
        """[T, hidden], sorted by expert, and the router's probabilities -> [T, hidden], weighted by them, and no bias.

        Partial sums under expert tensor parallelism: the dispatcher adds them up when it sends tokens home.
        """
        first_2FI = [expert.linear_fc1.weight for expert in self.local_experts]
        second_IF = [expert.linear_fc2.weight for expert in self.local_experts]
        hidden_T2F = self._linear(tokens_TI, tokens_per_expert_E, first_2FI)
        if self.config.bias_activation_fusion:
            gated_TF = weighted_bias_swiglu_impl(hidden_T2F, None, probs_T[:, None])
        else:
            gated_TF = weighted_swiglu(hidden_T2F, probs_T)
        return self._linear(gated_TF, tokens_per_expert_E, second_IF), None

    def _linear(self, input_TI: Tensor, tokens_per_expert_E: Tensor, weights: list[Tensor]) -> Tensor:
        if self.product == "grouped":
            return grouped_linear(input_TI, tokens_per_expert_E, weights)
        return loop_linear(input_TI, tokens_per_expert_E, weights, into_main_grad=self.config.gradient_accumulation_fusion)


def loop_linear(input_TI: Tensor, tokens_per_expert_E: Tensor, weights_OI: Sequence[Tensor], *, into_main_grad: bool) -> Tensor:
    """x @ weight.T, each row with its expert's weight: [T, I] sorted by expert, E times [O, I] -> [T, O]. One product per expert.

    into_main_grad: backward adds to `weight.main_grad`, as Megatron's linear layers do with gradient_accumulation_fusion.
    """
    return _LoopLinear.apply(input_TI, tokens_per_expert_E.tolist(), into_main_grad, *weights_OI)


def grouped_linear(input_TI: Tensor, tokens_per_expert_E: Tensor, weights_OI: Sequence[Tensor]) -> Tensor:
    """The same in one grouped product. On CUDA in bf16, I and O must be multiples of 8."""
    offsets_E = tokens_per_expert_E.to(input_TI.device, non_blocking=True).cumsum(0).to(torch.int32)
    return _GroupedLinear.apply(input_TI, offsets_E, *weights_OI)


class _LoopLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, counts: list[int], into_main_grad: bool, *weights_OI: Tensor) -> Tensor:
        ctx.save_for_backward(input_TI, *weights_OI)
        ctx.counts, ctx.into_main_grad = counts, into_main_grad
        output_TO = input_TI.new_empty(len(input_TI), len(weights_OI[0]))
        for x, weight, out in zip(input_TI.split(counts), weights_OI, output_TO.split(counts), strict=True):
            torch.mm(x, weight.t(), out=out)
        return output_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, *weights_OI = ctx.saved_tensors
        grad_input_TI = torch.empty_like(input_TI)
        parts = (x.split(ctx.counts) for x in (grad_TO, input_TI, grad_input_TI))
        weight_grads = []
        for weight, grad, x, grad_x in zip(weights_OI, *parts, strict=True):
            torch.mm(grad, weight, out=grad_x)
            if ctx.into_main_grad:
                weight_gradient.wgrad_gemm_accum_fp32(x, grad, weight.main_grad)
                weight.grad_added_to_main_grad = True
                # Never read, but without a gradient Megatron's overlapped reduction would not see the parameter as ready.
                weight_grads.append(torch.empty_like(weight))
            else:
                weight_grads.append(grad.t() @ x)
        return grad_input_TI, None, None, *weight_grads


class _GroupedLinear(torch.autograd.Function):
    """Stacks the weights anew in backward: the stacked copy is the layer's largest tensor."""

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, offsets_E: Tensor, *weights_OI: Tensor) -> Tensor:
        ctx.save_for_backward(input_TI, offsets_E, *weights_OI)
        return F.grouped_mm(input_TI, torch.stack(weights_OI).transpose(1, 2), offs=offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, offsets_E, *weights_OI = ctx.saved_tensors
        grad_TO = grad_TO.contiguous()
        grad_input_TI = F.grouped_mm(grad_TO, torch.stack(weights_OI), offs=offsets_E)
        weight_grads_EOI = F.grouped_mm(grad_TO.t(), input_TI, offs=offsets_E)
        return grad_input_TI, None, *weight_grads_EOI.unbind()


def weighted_swiglu(hidden_T2F: Tensor, probs_T: Tensor) -> Tensor:
    """silu(gate) * up * prob, gate and up side by side: [T, 2F], [T] -> [T, F], dtype of hidden. Source: arXiv:2002.05202, eq. 6."""
    return _WeightedSwiGLU.apply(hidden_T2F, probs_T)


class _WeightedSwiGLU(torch.autograd.Function):
    """Keeps its input only, and writes both halves of the gradient where they belong."""

    @staticmethod
    def forward(ctx: Any, hidden_T2F: Tensor, probs_T: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_T2F, probs_T)
        gate_TF, up_TF = hidden_T2F.chunk(2, dim=-1)
        return F.silu(gate_TF).mul_(up_TF).mul_(probs_T[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        hidden_T2F, probs_T = ctx.saved_tensors
        gate_TF, up_TF = hidden_T2F.chunk(2, dim=-1)
        grad_hidden_T2F = torch.empty_like(hidden_T2F)
        grad_gate_TF, grad_up_TF = grad_hidden_T2F.chunk(2, dim=-1)
        torch.mul(grad_TF, F.silu(gate_TF), out=grad_up_TF)
        grad_probs_T = torch.linalg.vecdot(grad_up_TF, up_TF)
        grad_up_TF.mul_(probs_T[:, None])
        grad_silu_TF = torch.mul(grad_TF, up_TF).mul_(probs_T[:, None])
        torch.ops.aten.silu_backward.grad_input(grad_silu_TF, gate_TF, grad_input=grad_gate_TF)
        return grad_hidden_T2F, grad_probs_T
