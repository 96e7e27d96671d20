"""Copies through a few small buffers equal their tensors, also where the device fills a buffer as late as it may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.host_copy import copy_through, copy_to_host

SIZE = 24  # bytes of a buffer: no multiple of most tensors below


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(7, 5, generator=generator),
        torch.randn(5, 7, generator=generator).t(),  # not contiguous
        torch.randn(9, generator=generator).bfloat16(),
        torch.tensor(3.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.randint(0, 99, (3,), generator=generator),
    ]


class LateDevice:
    """A device that does a copy when its event is waited for, and no sooner: what `copy_` is asked to do without blocking is queued."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.most = 0

    def event(self) -> Any:
        device, upto = self, len(self.queue)

        class Event:
            def record(self) -> None:
                nonlocal upto
                upto = len(device.queue)

            def synchronize(self) -> None:
                for copy in device.queue[:upto]:
                    copy()
                device.queue[:upto] = [lambda: None] * upto

        return Event()


class Buffer(Tensor):
    """A host buffer whose non-blocking copies the late device does."""

    device_of: LateDevice

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and (kwargs or {}).get("non_blocking"):
            target, source = args[0].as_subclass(Tensor), args[1].clone()
            Buffer.device_of.queue.append(lambda: target.copy_(source))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("count", [1, 3])
def test_no_buffer_is_read_before_it_is_full_or_filled_before_it_is_read(count: int) -> None:
    device = Buffer.device_of = LateDevice()
    buffers = [torch.zeros(SIZE, dtype=torch.uint8).as_subclass(Buffer) for _ in range(count)]
    found = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors()]
    copy_through(buffers, zip(found, tensors(), strict=True), new_event=device.event)
    for copied, tensor in zip(found, tensors(), strict=True):
        assert (copied.dtype, copied.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(copied, tensor)


def test_tensors_on_the_host_are_copied_too() -> None:
    originals = tensors()
    found = copy_to_host(originals)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(found, originals, strict=True) if a.numel())
