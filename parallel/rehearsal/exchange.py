"""Collectives of fake tensors: counted, checked against their backend, and answered as if every rank held what this one holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from parallel.rehearsal.call_site import call_site
from parallel.rehearsal.faults import DeviceFault, NotRehearsable
from parallel.rehearsal.groups import FakeGroups
from parallel.rehearsal.tally import Tally
from parallel.rehearsal.twins import Twins

# c10d operator -> the name to count it by, the argument that is handed over, what the operator returns beside its work.
_OPERATORS: dict[str, tuple[str, int, bool]] = {
    "allreduce_": ("all_reduce", 0, True),
    "allreduce_coalesced_": ("all_reduce", 0, False),
    "broadcast_": ("broadcast", 0, True),
    "reduce_": ("reduce", 0, False),
    "_allgather_base_": ("all_gather", 1, True),
    "allgather_": ("all_gather", 1, True),
    "allgather_coalesced_": ("all_gather", 1, False),
    "allgather_into_tensor_coalesced_": ("all_gather", 1, False),
    "_reduce_scatter_base_": ("reduce_scatter", 1, True),
    "reduce_scatter_": ("reduce_scatter", 1, True),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, False),
    "alltoall_base_": ("all_to_all", 1, False),
    "alltoall_": ("all_to_all", 1, True),
    "gather_": ("gather", 1, False),
    "scatter_": ("scatter", 1, True),
    "send": ("send", 0, False),
    "recv_": ("recv", 0, False),
    "recv_any_source_": ("recv", 0, False),
    "barrier": ("barrier", 0, False),
    "monitored_barrier_": ("barrier", 0, False),
}
# Kinds whose dtypes NCCL and gloo know. 8-bit floats travel as bytes in all of them.
_NCCL_DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
    }
)


class Exchange:
    """Runs the collectives of one rank."""

    def __init__(self, groups: FakeGroups, twins: Twins, tally: Callable[[], Tally]) -> None:
        self._groups = groups
        self._twins = twins
        self._tally = tally

    def run(self, operator: Any, arguments: Sequence[Any]) -> Any:
        """
        Raises:
            DeviceFault: what the backend would refuse.
            NotRehearsable: a collective that is not known here.
        """
        name = operator.overloadpacket.__name__
        if name not in _OPERATORS:
            raise NotRehearsable(f"c10d.{name} at {call_site()}: the rehearsal does not know this collective")
        kind, handed_over, returns_output = _OPERATORS[name]
        boxed = next(x for x in arguments if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        group = dist.ProcessGroup.unbox(boxed)
        key = self._groups.key(kind, group)
        tensors = [leaf for leaf in tree_leaves(list(arguments)) if isinstance(leaf, Tensor)]
        if kind != "barrier":
            check_collective(kind, key.group, key.backend, tensors)
            given = [leaf for leaf in tree_leaves(arguments[handed_over]) if isinstance(leaf, Tensor)]
            self._tally().collective(key, sum(x.numel() * x.element_size() for x in given))
            self._answer(name, arguments, group)
        work = torch._C._distributed_c10d.FakeWork()
        boxed_work = work.boxed() if hasattr(work, "boxed") else work
        return (arguments[0], boxed_work) if returns_output else boxed_work

    def _answer(self, name: str, arguments: Sequence[Any], group: dist.ProcessGroup) -> None:
        """Values of what arrives, as if the other ranks held the same."""
        twins, size = self._twins, group.size()
        if name == "_allgather_base_":
            output, given = arguments[0], twins.of(arguments[1])
            twins.write(output, None if given is None else torch.cat([given.reshape(-1)] * size).view(output.shape))
        elif name == "allgather_":
            given = twins.of(arguments[1][0])
            for output in arguments[0][0]:
                twins.write(output, given)
        elif name == "_reduce_scatter_base_":
            output, given = arguments[0], twins.of(arguments[1])
            twins.write(output, None if given is None else (given.reshape(size, -1)[group.rank()] * size).view(output.shape))
        elif name == "alltoall_base_":
            output, given = arguments[0], twins.of(arguments[1])
            twins.write(output, given.view(output.shape) if given is not None and given.numel() == output.numel() else None)
        elif name == "allreduce_":
            for tensor in arguments[0]:
                twin = twins.of(tensor)
                if twin is not None and isinstance(tensor, FakeTensor) and "SUM" in str(arguments[2]):
                    twin.mul_(size)
        elif name.startswith("recv"):
            for tensor in arguments[0]:
                twins.write(tensor, None if tensor.is_floating_point() else torch.zeros(tensor.shape, dtype=tensor.dtype))
        elif name not in ("broadcast_", "send"):
            for output in tree_leaves(arguments[0]):
                if isinstance(output, Tensor):
                    twins.forget(output)


def check_collective(kind: str, group: str, backend: str, tensors: Sequence[Tensor]) -> None:
    """Raises DeviceFault for what the backend would refuse, naming the collective, its group and the call site."""
    for tensor in tensors:
        where = f"{kind} over {group} ({backend}) at {call_site()}"
        shape = f"{tensor.dtype} {list(tensor.shape)}"
        if backend == "nccl" and tensor.device.type != "cuda":
            raise DeviceFault(f"{where}: a tensor on the CPU ({shape}); NCCL takes CUDA tensors only")
        if backend == "gloo" and tensor.device.type == "cuda":
            raise DeviceFault(f"{where}: a tensor on CUDA ({shape}); this group is for tensors on the CPU")
        if backend == "nccl" and not tensor.is_contiguous():
            raise DeviceFault(f"{where}: a tensor that is not contiguous ({shape}, strides {list(tensor.stride())})")
        if backend == "nccl" and tensor.dtype not in _NCCL_DTYPES:
            raise DeviceFault(f"{where}: dtype {tensor.dtype}; NCCL does not know it")
    if kind != "barrier" and len({tensor.dtype for tensor in tensors}) > 1:
        dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
        raise DeviceFault(f"{kind} over {group} ({backend}) at {call_site()}: input and output differ in dtype ({dtypes})")
