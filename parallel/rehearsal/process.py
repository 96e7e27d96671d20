"""Turns this process into one that rehearses: torch.cuda, process groups and some methods of tensors are stand-ins from then on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from parallel.rehearsal import attention_choice, cuda_kernels, tensor_methods, torch_cuda
from parallel.rehearsal.fake_device import FakeDevice

if TYPE_CHECKING:
    from parallel.rehearsal.phases import Rehearsal


def prepare(progress: Callable[[str], None]) -> Rehearsal:
    """Call it once, after `device_guard.load` and before anything imports Megatron-Core.

    progress: told which phase of which rank begins.
    """
    torch.autograd.set_multithreading_enabled(False)  # a backward pass on another thread would leave the dispatch mode
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") begins on the CPU
    logging.disable(logging.CRITICAL)  # torch logs what it raises; Megatron-Core logs that other ranks differ from this one
    device = FakeDevice()
    torch_cuda.install(wait=lambda what: device.tally.wait(what), allocated=lambda: device.ledger.live, peak=lambda: device.ledger.peak)
    tensor_methods.install(device.twins, wait=lambda what: device.tally.wait(what), resized=lambda storage: device.ledger.resized(storage))
    attention_choice.install()
    cuda_kernels.install()
    from parallel.rehearsal.phases import Rehearsal  # imports Megatron-Core, which must find the stand-ins

    rehearsal = Rehearsal(device, progress)
    gc.collect()
    gc.freeze()  # what was imported stays: every later collection looks at the model alone
    return rehearsal
