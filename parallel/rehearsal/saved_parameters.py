"""A linear layer's backward pass finds its parameter as the object that it is.

The hooks that count what is saved for backward give back another tensor over the same memory, without the attributes that Megatron-Core
keeps on a parameter: then it would not add the gradient where it is kept, and overlapped reduction would stop.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class _WithParameter:
    """The context of a backward pass. saved_tensors: input, and the parameter itself."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor]:
        return self._context.saved_tensors[0], self._context.parameter


def install() -> None:
    """For the rest of the process."""
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as Linear

    own_forward, own_backward = Linear.forward, Linear.backward

    def forward(ctx: Any, x: Tensor, weight: Tensor, *options: Any) -> Any:
        ctx.parameter = weight
        return own_forward(ctx, x, weight, *options)

    def backward(ctx: Any, grad: Tensor) -> Any:
        return own_backward(_WithParameter(ctx), grad)

    Linear.forward, Linear.backward = staticmethod(forward), staticmethod(backward)
