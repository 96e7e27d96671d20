"""What `torch.cuda` means to megatron.core on a machine without CUDA: one device, one stream, the CPU's random state.

Only megatron.core sees this module (see `import_hook.py`); `torch.cuda` itself is left alone. Names that are not
defined here fall through to the real `torch.cuda`, so an unforeseen use fails loudly there.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_real = torch.cuda
_CPU = torch.device("cpu")


class Event:
    """An event on the only stream: everything before it has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Stream:
    """The only stream. All instances are equal, so "am I on a side stream" is always answered with no."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def record_event(self, event: Event | None = None) -> Event:
        return Event()

    def synchronize(self) -> None: ...


_STREAM = Stream()


def current_device() -> torch.device:
    return _CPU


def device_count() -> int:
    return 1


def is_available() -> bool:
    return False


def synchronize(*args: Any, **kwargs: Any) -> None: ...
def empty_cache() -> None: ...
def set_device(*args: Any) -> None: ...


def is_current_stream_capturing() -> bool:
    return False


def current_stream(*args: Any) -> Stream:
    return _STREAM


def default_stream(*args: Any) -> Stream:
    return _STREAM


@contextlib.contextmanager
def stream(_stream: Stream | None) -> Iterator[None]:
    yield


@contextlib.contextmanager
def device(*args: Any) -> Iterator[None]:
    yield


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


manual_seed_all = manual_seed
random = types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state)


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


default_generators = _Generators()


def _lazy_call(callback: Callable[[], None], **kwargs: Any) -> None:
    callback()


def _lazy_init() -> None: ...


nvtx = types.SimpleNamespace(range_push=lambda *args: None, range_pop=lambda: None, range=lambda *args: contextlib.nullcontext())


def memory_allocated(*args: Any) -> int:
    return 0


def max_memory_allocated(*args: Any) -> int:
    return 0


def __getattr__(name: str) -> Any:
    return getattr(_real, name)
