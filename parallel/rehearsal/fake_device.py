"""The fake device of a rehearsal: a dispatch mode that sees every operator of the program.

Shapes, dtypes and devices come from torch's fake kernels; memory, collectives, waits and kernels are counted on the way. Values that the
program reads come from twins, or are guessed: a float is 1, a boolean False, an expert's load the mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from parallel.rehearsal import kernel_rules
from parallel.rehearsal.call_site import call_site
from parallel.rehearsal.exchange import Exchange
from parallel.rehearsal.faults import DeviceFault, NotRehearsable
from parallel.rehearsal.groups import FakeGroups
from parallel.rehearsal.ledger import MemoryLedger
from parallel.rehearsal.tally import Tally
from parallel.rehearsal.twins import Twins, compute, constant, is_constant, is_small, may_be_map

_FILLS = frozenset(("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"))
_CONSTANTS = MappingProxyType({"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1})
_IN_PLACE_FILLS = frozenset(("zero_", "fill_"))
# Of these only the shape of the result is asked for, so unknown floats do.
_SHAPES_BY_VALUE = frozenset(("masked_select", "index", "repeat_interleave"))
_HOST_BYTES = 1 << 20  # a larger uninitialised host tensor is fake


class FakeDevice(TorchDispatchMode):
    """See the module. Enter it around the program; `ledger` and `tally` say what happened."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.twins = Twins()
        self.ledger = MemoryLedger()
        self.host_ledger = MemoryLedger()
        self.tally = Tally()
        self.deterministic = False
        self._exchange: Exchange | None = None

    def connect(self, groups: FakeGroups) -> None:
        """Collectives go over these groups."""
        self._exchange = Exchange(groups, self.twins, lambda: self.tally)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            assert self._exchange is not None
            return self._exchange.run(func, args)
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else None
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and not (device is not None and device.type == "cuda"):
            if not tensors and _is_large_on_host(func, args, kwargs):
                with self.fake:
                    out = func(*args, **kwargs)
                self.host_ledger.track(out)
                return out
            return func(*args, **kwargs)
        try:
            return self._run(func, args, kwargs, leaves, structure, tensors, device)
        except UnsupportedOperatorException as error:
            raise NotRehearsable(f"{func} at {call_site()}: torch has no fake kernel for this operator") from error

    def _run(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        leaves: list[Any],
        structure: TreeSpec,
        tensors: list[Tensor],
        device: torch.device | None,
    ) -> Any:
        name = func.overloadpacket.__name__
        twins = self._twins_of(name, tensors)
        self._watch_copies(name, tensors, args, kwargs, device)
        kernel_rules.check(func, tensors, deterministic=self.deterministic)
        if name == "_pin_memory":
            return torch.ops.aten.clone.default(tensors[0])
        if name == "_local_scalar_dense":
            return self._read(tensors[0], twins[0])
        if name == "equal":
            self.tally.wait("equal")
            return bool(func(*twins)) if _all_known(twins) else True
        try:
            if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
                args, kwargs = tree_unflatten([self._fake_of(leaf) for leaf in leaves], structure)
            out = self._shape(func, args, kwargs, tensors)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._by_value(func, name, leaves, structure, tensors, twins)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            if isinstance(tensor, FakeTensor):
                (self.ledger if tensor.device.type == "cuda" else self.host_ledger).track(tensor)
        if kernel_rules.is_kernel(func) and any(tensor.device.type == "cuda" for tensor in outputs or tensors):
            self.tally.kernels += 1
        if outputs and self._follow(func, name, leaves, structure, twins, outputs):
            return out
        self._forget_written(func, args, kwargs)
        if name in _CONSTANTS:
            self.twins.give(outputs[0], constant(outputs[0], _CONSTANTS[name]))
        elif name == "topk":
            self._balance(tensors[0], outputs[1])
        return out

    def _twins_of(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Values of the inputs. What is filled needs none, so a fill gives a tensor its first twin."""
        twins = [self.twins.of(tensor) for tensor in tensors]
        if _all_known(twins) or not tensors or not is_small(tensors[0]):
            return twins
        first = tensors[0]
        if name in _FILLS or (name in _IN_PLACE_FILLS and len(tensors) == 1 and first._base is None):
            twins[0] = torch.empty(first.shape, dtype=first.dtype)
        return twins

    def _watch_copies(self, name: str, tensors: Sequence[Tensor], args: Any, kwargs: Any, device: torch.device | None) -> None:
        if name not in ("_to_copy", "copy_"):
            return
        source = tensors[-1] if name == "copy_" else tensors[0]
        target = tensors[0].device if name == "copy_" else (device or source.device)
        blocking = not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2])
        if source.device.type == "cuda" and target.type == "cpu" and blocking:
            self.tally.wait("copy to the host")

    def _read(self, tensor: Tensor, twin: Tensor | None) -> Any:
        if tensor.device.type == "cuda":
            self.tally.wait("item")
        if twin is not None:
            return twin.item()
        self.tally.guess(f"{tensor.dtype} scalar")
        return 1.0 if tensor.is_floating_point() else False if tensor.dtype == torch.bool else 0

    def _shape(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        try:
            with contextlib.nullcontext() if tensors else self.fake:
                return func(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, FakeTensorDeviceMismatchError) or "different devices" in str(error):
                devices = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
                raise DeviceFault(f"{func} at {call_site()}: tensors on more than one device ({devices})") from error
            if "no fake impl registered" in str(error):
                raise NotRehearsable(f"{func} at {call_site()}: torch has no fake kernel for this operator") from error
            if type(error) is RuntimeError and ("dtype" in str(error) or "must be" in str(error)):
                dtypes = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
                raise DeviceFault(f"{func} at {call_site()}: {' '.join(str(error).split())} ({dtypes})") from error
            raise

    def _fake_of(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            with self.fake:
                return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
        return leaf

    def _by_value(
        self,
        func: Any,
        name: str,
        leaves: Sequence[Any],
        structure: TreeSpec,
        tensors: Sequence[Tensor],
        twins: list[Tensor | None],
    ) -> Any:
        """The result's shape depends on values: CUDA waits, and here the twins say it."""
        self.tally.wait(f"shape of {name}")
        self.tally.kernels += 1
        values_count = True
        if name in _SHAPES_BY_VALUE:
            for index, tensor in enumerate(tensors):
                if twins[index] is None and tensor.is_floating_point():
                    twins[index] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    values_count = False
        if not _all_known(twins):
            shapes = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
            raise NotRehearsable(f"{func} at {call_site()}: its shape depends on values that were not computed ({shapes})")
        device = tensors[0].device

        def on_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            with self.fake:
                made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            if values_count:
                self.twins.give(made, value)
            if device.type == "cuda":
                self.ledger.track(made)
            return made

        return tree_map(on_device, compute(func, leaves, structure, twins))

    def _follow(
        self,
        func: Any,
        name: str,
        leaves: Sequence[Any],
        structure: TreeSpec,
        twins: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
    ) -> bool:
        """Twins of the outputs, where all inputs have one and the outputs are small. Says whether that is so."""
        if func.namespace != "aten" or name.startswith("_fused") or not _all_known(twins):
            return False
        written = twins[0] if twins else None
        if name == "index_put_" and written is not None and is_constant(written) and may_be_map(outputs[0]):
            real = torch.empty_like(written, memory_format=torch.contiguous_format).copy_(written)  # of a deterministic run's routing
            self.twins.give(outputs[0], compute(func, leaves, structure, [real, *twins[1:]]))
            return True
        if not all(map(is_small, outputs)):
            return False
        if kernel_rules.written_arguments(func) and any(map(is_constant, twins)):
            return False
        values = [leaf for leaf in tree_leaves(compute(func, leaves, structure, twins)) if isinstance(leaf, Tensor)]
        for tensor, value in zip(outputs, values, strict=True):
            self.twins.give(tensor, value)
        return True

    def _forget_written(self, func: Any, args: Any, kwargs: Any) -> None:
        """What an operator writes to loses its twin."""
        for index, name in kernel_rules.written_arguments(func):
            written = args[index] if index < len(args) else kwargs.get(name)
            for leaf in tree_leaves(written):
                if isinstance(leaf, Tensor):
                    self.twins.forget(leaf)

    def _balance(self, scores: Tensor, chosen: Tensor) -> None:
        """The router chooses experts by weights that nobody computed: every expert gets equally many tokens."""
        num_tokens, per_token = chosen.shape
        first = dist.get_rank() * num_tokens * per_token
        flat = (torch.arange(num_tokens * per_token) + first) % scores.size(-1)
        self.twins.give(chosen, flat.view(num_tokens, per_token))


def _all_known(twins: Sequence[Tensor | None]) -> bool:
    return all(twin is not None for twin in twins)


def _is_large_on_host(func: Any, args: Any, kwargs: Any) -> bool:
    """Weights and checkpoints pass through host memory in pieces that nobody reads here."""
    if not func.overloadpacket.__name__.startswith("empty") or not args:
        return False
    count = 1
    for size in args[0]:
        count *= size
    return count > _HOST_BYTES and kwargs.get("dtype") in (None, torch.float32, torch.bfloat16)
