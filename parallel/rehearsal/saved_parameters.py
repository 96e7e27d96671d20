"""A linear layer's backward pass finds its parameters as the objects that they are.

The hooks that count what is saved for backward give back another tensor over the same memory, without the attributes that Megatron-Core
keeps on a parameter: then it would not add the gradient where it is kept, and overlapped reduction would stop.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class _WithParameters:
    """The context of a backward pass. saved_tensors: input, and the parameters themselves."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self._context.saved_tensors[0], *self._context.parameters


def install() -> None:
    """For the rest of the process."""
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear

    from parallel.layers.experts import _LoopLinear

    _keep_parameters(Linear, lambda weight, *_: (weight,))
    _keep_parameters(_LoopLinear, lambda counts, into_main_grad, *weights: weights)


def _keep_parameters(function: Any, parameters_of: Any) -> None:
    """parameters_of: of what forward is given behind the input."""
    own_forward, own_backward = function.forward, function.backward

    def forward(ctx: Any, x: Tensor, *rest: Any) -> Any:
        ctx.parameters = parameters_of(*rest)
        return own_forward(ctx, x, *rest)

    def backward(ctx: Any, grad: Tensor) -> Any:
        return own_backward(_WithParameters(ctx), grad)

    function.forward, function.backward = staticmethod(forward), staticmethod(backward)
