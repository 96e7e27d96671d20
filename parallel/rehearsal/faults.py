"""What a rehearsal finds wrong: what CUDA or NCCL would raise, and what the rehearsal itself cannot do."""

from __future__ import annotations


class DeviceFault(RuntimeError):
    """CUDA, a kernel or NCCL would refuse this. The message names the operator or collective and the call site."""


class NotRehearsable(ValueError):
    """The program asks for something that no fake device can answer: an operator without a fake kernel, a value nobody computed."""
