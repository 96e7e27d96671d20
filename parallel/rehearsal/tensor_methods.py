"""Methods of tensors and modules that do not reach a dispatch mode, or that fake tensors do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from parallel.rehearsal.call_site import call_site
from parallel.rehearsal.faults import DeviceFault, NotRehearsable
from parallel.rehearsal.twins import Twins


def install(twins: Twins, *, wait: Callable[[str], None], resized: Callable[[torch.UntypedStorage], None]) -> None:
    """For the rest of the process.

    Args:
        twins: the values of fake tensors.
        wait: told when the host waits for the device.
        resized: told of a fake storage that was given another size in place.
    """
    _install_reading(twins, wait)
    _install_tensor_of_tensors()
    _install_storages(resized)
    _install_data_of_parameters()
    _replace(torch.nn.Module, _apply=_apply)


def _replace(owner: type, **members: Any) -> None:
    for name, member in members.items():
        setattr(owner, name, member)


def _install_reading(twins: Twins, wait: Callable[[str], None]) -> None:
    to_numpy, to_list = Tensor.numpy, Tensor.tolist

    def values(tensor: FakeTensor, what: str) -> Tensor:
        twin = twins.of(tensor)
        if twin is None:
            raise NotRehearsable(f"{what} of a {tensor.dtype} {list(tensor.shape)} at {call_site()}: its values were not computed")
        return twin

    def numpy(self: Tensor, **options: Any) -> Any:
        if not isinstance(self, FakeTensor):
            return to_numpy(self, **options)
        if self.device.type == "cuda":
            raise DeviceFault(f"numpy of a tensor on CUDA at {call_site()}; it must be copied to the CPU first")
        with _disable_current_modes():
            return to_numpy(values(self, "numpy"), **options)

    def tolist(self: Tensor) -> Any:
        if not isinstance(self, FakeTensor):
            return to_list(self)
        if self.device.type == "cuda":
            wait("tolist")
        return to_list(values(self, "tolist"))

    _replace(Tensor, numpy=numpy, tolist=tolist)
    _replace(FakeTensor, tolist=tolist)


def _install_tensor_of_tensors() -> None:
    """torch.tensor of a list that holds fake tensors: on CUDA every element is read by itself."""
    make = torch.tensor

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return value.item() if isinstance(value, FakeTensor) else value

    def tensor(data: Any, *arguments: Any, **options: Any) -> Tensor:
        return make(plain(data) if isinstance(data, (list, tuple)) else data, *arguments, **options)

    torch.tensor = tensor


def _install_storages(resized: Callable[[torch.UntypedStorage], None]) -> None:
    """Fake storages have no memory; their own identity stands for its address."""
    address, resize = torch.UntypedStorage.data_ptr, torch.UntypedStorage.resize_

    def resize_and_tell(self: torch.UntypedStorage, size: int) -> Any:
        found = resize(self, size)
        if self.device.type == "meta":
            resized(self)
        return found

    def data_ptr(self: torch.UntypedStorage) -> int:
        return self._cdata if self.device.type == "meta" else address(self)

    def data_ptr_of_tensor(self: FakeTensor) -> int:
        return self.untyped_storage()._cdata + self.storage_offset() * self.element_size()

    _replace(torch.UntypedStorage, data_ptr=data_ptr, resize_=resize_and_tell)
    _replace(FakeTensor, data_ptr=data_ptr_of_tensor)


def _install_data_of_parameters() -> None:
    """`parameter.data = tensor on the device` for a parameter on the CPU, which torch cannot do with a fake tensor."""
    data: Any = Tensor.data

    def put(self: Tensor, value: Tensor) -> None:
        if isinstance(self, FakeTensor) and isinstance(value, FakeTensor):  # large ones in host memory are fake, too
            data.__set__(self, value)
            self.fake_device = value.fake_device
            return
        if not isinstance(value, FakeTensor):
            data.__set__(self, value)
            return
        replaced = torch.nn.Parameter(value, self.requires_grad)
        attributes = {name: each for name, each in vars(self).items() if not name.startswith("_")}
        torch.utils.swap_tensors(self, replaced)
        for name, each in attributes.items():
            setattr(self, name, each)

    for kind in (torch.nn.Parameter, FakeTensor):
        _replace(kind, data=property(lambda self: data.__get__(self), put))


def _apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """As torch's for real tensors: parameters keep their attributes, and what does not change is left alone.

    Torch swaps the data of a parameter in place, which it cannot do from a real tensor to a fake one: here the parameter is a new one.
    """
    if recurse:
        for child in self.children():
            child._apply(fn)
    for name, parameter in list(self._parameters.items()):
        if parameter is None:
            continue
        with torch.no_grad():
            applied = fn(parameter)
        if applied is parameter or (applied.dtype == parameter.dtype and applied.device == parameter.device):
            continue
        replaced = torch.nn.Parameter(applied, parameter.requires_grad)
        for attribute, value in vars(parameter).items():
            if not attribute.startswith("_"):
                setattr(replaced, attribute, value)
        self._parameters[name] = replaced
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
