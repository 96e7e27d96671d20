"""Real values behind fake tensors, where the program reads them: lengths, offsets, maps, split sizes.

A small integer or boolean tensor on the fake device keeps a CPU twin, computed by the same operators from the twins of its inputs. Views
of a tensor have views of its twin. Floating-point values have twins only where they are few, or all the same. What depends on weights has
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import TreeSpec, tree_unflatten

_CPU = torch.device("cpu")
_INTEGER_BYTES = 64 << 20
_FLOAT_BYTES = 1 << 16
_DEVICE_ONLY = ("pin_memory", "non_blocking")


def is_small(tensor: Tensor) -> bool:
    """Small enough for a twin."""
    return tensor.numel() * tensor.element_size() <= (_FLOAT_BYTES if tensor.is_floating_point() else _INTEGER_BYTES)


def constant(tensor: Tensor, value: int) -> Tensor:
    """A twin with one value everywhere, in the memory of one number: maps begin as zeros. It cannot be written to."""
    return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)


def may_be_map(tensor: Tensor) -> bool:
    """Small enough for a twin, if it is a map in spite of a floating-point dtype."""
    return tensor.numel() * tensor.element_size() <= _INTEGER_BYTES


def is_constant(twin: Tensor | None) -> bool:
    """Whether it was made by `constant`."""
    return twin is not None and twin.numel() > 1 and not any(twin.stride())


class Twins:
    """Which fake tensors have a twin. The storage of a twin that became wrong is emptied, which its views see as well."""

    def of(self, tensor: Tensor) -> Tensor | None:
        """The real values: the tensor itself on the CPU; None where they are not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        twin: Tensor | None = getattr(tensor, "_twin", None)
        return None if twin is None or (twin.numel() and not twin.untyped_storage().nbytes()) else twin

    def give(self, tensor: Tensor, twin: Tensor) -> None:
        """These are the tensor's values."""
        if isinstance(tensor, FakeTensor):
            tensor._twin = twin  # type: ignore[attr-defined]

    def write(self, tensor: Tensor, values: Tensor | None) -> None:
        """The tensor's content becomes these values, for all its views; None: values that are not known."""
        if values is None:
            self.forget(tensor)
            return
        twin = self.of(tensor)
        if twin is None:
            self.give(tensor, values.clone())
        else:
            twin.copy_(values)

    def forget(self, tensor: Tensor) -> None:
        """The tensor's content is no longer known, nor that of its views."""
        twin = getattr(tensor, "_twin", None) if isinstance(tensor, FakeTensor) else None
        if twin is not None:
            twin.untyped_storage().resize_(0)
            tensor._twin = None  # type: ignore[attr-defined]


def compute(operator: Any, leaves: Sequence[Any], structure: TreeSpec, twins: Sequence[Tensor | None]) -> Any:
    """The operator on the CPU, every tensor replaced by its twin."""
    replacements = iter(twins)
    replaced = [next(replacements) if isinstance(leaf, Tensor) else _CPU if isinstance(leaf, torch.device) else leaf for leaf in leaves]
    arguments, options = tree_unflatten(replaced, structure)
    options = {name: value for name, value in options.items() if name not in _DEVICE_ONLY}
    if "device" in options:
        options["device"] = _CPU
    return operator(*arguments, **options)
