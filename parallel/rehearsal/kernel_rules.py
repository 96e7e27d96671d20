"""What operators are on CUDA beyond their shapes: whether they launch a kernel, and what their kernels refuse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from parallel.rehearsal.call_site import call_site
from parallel.rehearsal.faults import DeviceFault

_NO_KERNEL = frozenset(
    (
        "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "resize_", "set_", "_local_scalar_dense",
        "detach", "alias", "lift_fresh", "is_pinned", "record_stream", "_unsafe_view",
    )
)  # fmt: skip
# torch.use_deterministic_algorithms: operators that raise on CUDA (its documentation, torch 2.13).
_NOT_DETERMINISTIC = frozenset(
    (
        "_ctc_loss", "_embedding_bag", "adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward",
        "fractional_max_pool2d_backward", "histc", "kthvalue", "max_pool3d_with_indices_backward", "max_unpool2d", "nll_loss2d_forward",
        "put_", "reflection_pad1d_backward", "replication_pad1d_backward", "upsample_linear1d_backward",
    )
)  # fmt: skip
# Which inputs of a product must agree in dtype: the fake kernels of some take any two.
_FACTORS = {**dict.fromkeys(("mm", "bmm", "mv", "dot", "_grouped_mm"), slice(2)), **dict.fromkeys(("addmm", "baddbmm"), slice(1, 3))}
_16_BIT = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes, of the rows of a grouped product


@lru_cache(maxsize=4096)
def is_kernel(operator: Any) -> bool:
    """False for views, allocations and questions."""
    if operator.overloadpacket.__name__ in _NO_KERNEL:
        return False
    returns = operator._schema.returns
    aliases = [each.alias_info for each in returns]
    return not (returns and all(alias is not None and not alias.is_write for alias in aliases))


@lru_cache(maxsize=4096)
def written_arguments(operator: Any) -> tuple[tuple[int, str], ...]:
    """Index and name of every argument that the operator writes to."""
    arguments = enumerate(operator._schema.arguments)
    return tuple((index, each.name) for index, each in arguments if each.alias_info is not None and each.alias_info.is_write)


def check(operator: Any, tensors: Sequence[Tensor], *, deterministic: bool) -> None:
    """Raises DeviceFault for what the CUDA kernel refuses and the fake kernel lets pass."""
    if not any(tensor.device.type == "cuda" for tensor in tensors):
        return
    name = operator.overloadpacket.__name__
    if deterministic and _throws(name, tensors):
        raise DeviceFault(f"{operator} at {call_site()}: no deterministic CUDA kernel, which debug.deterministic asks for")
    factors = tensors[_FACTORS.get(name, slice(0))]
    if len({tensor.dtype for tensor in factors}) > 1:
        raise DeviceFault(f"{operator} at {call_site()}: factors of different dtypes ({', '.join(str(each.dtype) for each in factors)})")
    if name == "_grouped_mm":
        for tensor in factors:
            if tensor.size(-1) * tensor.element_size() % _ALIGNMENT and tensor.stride(-1) == 1:
                raise DeviceFault(
                    f"{operator} at {call_site()}: rows of {tensor.size(-1)} {tensor.dtype} numbers; "
                    f"the CUDA kernel needs rows of a multiple of {_ALIGNMENT} bytes"
                )
    if name.startswith("_scaled_dot_product_flash_attention") and tensors[0].dtype not in _16_BIT:
        raise DeviceFault(f"{operator} at {call_site()}: dtype {tensors[0].dtype}; flash attention takes bfloat16 and float16")


def _throws(name: str, tensors: Sequence[Tensor]) -> bool:
    if name == "cumsum":
        return tensors[0].is_floating_point()
    if name == "bincount":
        return len(tensors) > 1  # with weights
    return name in _NOT_DETERMINISTIC
