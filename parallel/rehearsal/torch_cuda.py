"""What `torch.cuda` is while a rehearsal runs: eight devices, one stream on which everything has already happened.

Names that are not listed stay those of torch and fail loudly on a torch without CUDA.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

DEVICES = 8
DEVICE_NAME = "NVIDIA H100 80GB HBM3 (rehearsed)"


class _Properties(types.SimpleNamespace):
    """Of an H100; memory is of no consequence, the rehearsal counts it itself."""


_PROPERTIES = _Properties(
    name=DEVICE_NAME,
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _ignore(*_: Any, **__: Any) -> None: ...


class _Generators:
    """A random generator for every device: the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return DEVICES


def install(*, wait: Callable[[str], None], allocated: Callable[[], int], peak: Callable[[], int]) -> None:
    """Put the stand-ins in place for the rest of the process.

    Args:
        wait: told when the host waits for the device, and for what.
        allocated: bytes that are alive on the device.
        peak: the most bytes that were alive.
    """

    class Event:
        """Everything before it has already happened."""

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def record(self, *_: Any) -> None: ...
        def wait(self, *_: Any) -> None: ...
        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            wait("event")

        def elapsed_time(self, other: Event) -> float:
            return 0.0

    class Stream:
        """The only stream; all instances are equal."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = torch.device("cuda", 0)
            self.device_index = 0
            self.cuda_stream = self.stream_id = 0

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Stream)

        def __hash__(self) -> int:
            return 0

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def wait_stream(self, stream: Stream) -> None: ...
        def wait_event(self, event: Event) -> None: ...
        def record_event(self, event: Event | None = None) -> Event:
            return Event() if event is None else event

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            wait("stream")

    random_state = torch.zeros(16, dtype=torch.uint8)
    values: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "_lazy_call": _ignore,
        "_lazy_init": _ignore,
        "current_device": lambda: 0,
        "current_stream": lambda *_: Stream(),
        "default_generators": _Generators(),
        "default_stream": lambda *_: Stream(),
        "device": _nothing,
        "device_count": lambda: DEVICES,
        "empty_cache": _ignore,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: DEVICE_NAME,
        "get_device_properties": lambda *_: _PROPERTIES,
        "get_rng_state": lambda *_, **__: random_state.clone(),
        "ipc_collect": _ignore,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": _ignore,
        "manual_seed_all": _ignore,
        "max_memory_allocated": lambda *_: peak(),
        "memory_allocated": lambda *_: allocated(),
        "memory_reserved": lambda *_: allocated(),
        "reset_peak_memory_stats": _ignore,
        "set_device": _ignore,
        "set_rng_state": _ignore,
        "set_stream": _ignore,
        "stream": _nothing,
        "synchronize": lambda *_, **__: wait("device"),
    }
    for name, value in values.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, values[name])
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _ignore)
