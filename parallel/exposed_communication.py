"""How long this rank waits in communication, per kind of process group. For collectives that block the host, as gloo's do.

On CUDA a collective only enters a queue here: what it costs is decided on the device, and this module refuses to guess.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from parallel.mcore import parallel_state

OTHER = "bookkeeping"  # gradient norm, metrics, barriers
PIPELINE = "pipeline"
KINDS = ("dispatch", "tensor parallelism", "context parallelism", PIPELINE, "gradients and parameters", OTHER)

_OPERATIONS = (
    "allreduce",
    "allreduce_coalesced",
    "allgather",
    "all_gather_single",
    "allgather_into_tensor_coalesced",
    "_allgather_base",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
    "_reduce_scatter_base",
    "all_to_all_single",
    "alltoall",
    "alltoall_base",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
)


def kinds_of_groups() -> dict[str, str]:
    """Name of a process group -> what it is for, one of KINDS. Groups of one rank, and of all ranks together, are left out."""
    groups = {
        "dispatch": (
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_tensor_and_model_parallel_group(),
        ),
        "tensor parallelism": (parallel_state.get_tensor_model_parallel_group(),),
        "context parallelism": (parallel_state.get_context_parallel_group(),),
        PIPELINE: (parallel_state.get_pipeline_model_parallel_group(),),
        "gradients and parameters": (
            parallel_state.get_data_parallel_group(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_group(),
        ),
    }
    return {group.group_name: kind for kind, members in groups.items() for group in members if group.size() > 1}


class _Work:
    """A collective under way whose waiting is timed."""

    def __init__(self, work: Any, add: Callable[[float], None]) -> None:
        self._work, self._add = work, add

    def wait(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work.wait(*arguments, **options)
        finally:
            self._add(time.perf_counter() - start)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def measure_waiting(kinds: Mapping[str, str]) -> Iterator[dict[str, float]]:
    """Seconds by kind that this process spends inside collectives, waiting for slower ranks included. Filled while the context is open.

    kinds: of kinds_of_groups; other groups of several ranks count as OTHER. Not for nested use.
    """
    seconds: dict[str, float] = {}

    def timed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            if group.size() == 1:
                return operation(group, *arguments, **options)
            kind = kinds.get(group.group_name, OTHER)

            def add(spent: float) -> None:
                seconds[kind] = seconds.get(kind, 0.0) + spent

            start = time.perf_counter()
            work = operation(group, *arguments, **options)
            add(time.perf_counter() - start)
            return work if work is None else _Work(work, add)

        return run

    originals = {name: vars(dist.ProcessGroup)[name] for name in _OPERATIONS}  # as they are stored: methods, not functions
    try:
        for name, operation in originals.items():
            setattr(dist.ProcessGroup, name, timed(operation))
        yield seconds
    finally:
        for name, operation in originals.items():
            setattr(dist.ProcessGroup, name, operation)
