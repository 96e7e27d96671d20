"""Model and optimizer as a Megatron torch_dist checkpoint that another layout can load."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_convert.checkpoint_pickle import check_metadata
from parallel import torch_checkpoint
from parallel.host_copy import copy_into, copy_to_host
from parallel.mcore import (
    MCoreSavePlanner,
    ShardedTensor,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    dist_checkpointing,
    ensure_metadata_has_dp_cp_group,
    mcore_to_pyt_state_dict,
)
from parallel.model import HiddenStateModel
from parallel.optimizer import inner_optimizers
from parallel.shard_writer import ShardWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A copy of this rank's part of a state.

    num_bytes: of its tensors.
    write: to be called once, on all ranks, with a gloo group over all of them, by any thread as long as nothing else uses that group: the
    model may change meanwhile. The folder exists by then and is empty. This rank's files are on the disk when it returns. Raises as
    `write_shards`.
    """

    num_bytes: int
    write: Callable[[dist.ProcessGroup], None]


def _sharded_model(modules: Sequence[HiddenStateModel]) -> dict[str, Any]:
    metadata = _metadata()
    return {_model_key(modules, index): module.sharded_state_dict(metadata=metadata) for index, module in enumerate(modules)}


def _sharded_state(modules: Sequence[HiddenStateModel], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    state = _sharded_model(modules)
    gc.freeze()  # Megatron collects garbage once per optimizer: over a whole program's objects that takes longer than the copies
    try:
        # Under virtual pipeline stages Megatron's optimizer expects the same keys.
        state["optimizer"] = optimizer.sharded_state_dict(
            state if len(modules) > 1 else state["model"], is_loading=is_loading, metadata=_metadata()
        )
    finally:
        gc.unfreeze()
    return state


def _metadata() -> dict[str, Any]:
    return ensure_metadata_has_dp_cp_group(
        {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    )


def _model_key(modules: Sequence[HiddenStateModel], index: int) -> str:
    return "model" if len(modules) == 1 else f"model{index}"


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Every torch.load inside the block refuses pickled code, also where a library asks it not to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


class _Capture(TorchDistSaveShardedStrategy):
    """Replaces Megatron's writer of tensors: copies them. Those in `incomplete` storages are left to _OptimizerCapture."""

    incomplete: frozenset[int]  # addresses of storages
    small_files: dict[str, bytes]  # what Megatron writes beside the tensors; the first rank's

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        self.to_fill: set[int] = set()  # those of `incomplete` that this rank will write
        by_key, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        to_copy: list[ShardedTensor] = []
        self.num_bytes = 0
        for pieces in by_key.values():
            for piece in pieces:
                if not isinstance(piece, ShardedTensor):
                    continue
                self.num_bytes += piece.data.nbytes
                address = piece.data.untyped_storage().data_ptr()
                if address in self.incomplete:
                    self.to_fill.add(address)
                    continue
                # A copy taken now would lack the other replicas' parts.
                assert not piece.key.startswith("optimizer.state."), piece.key
                to_copy.append(piece)
        for piece, copied in zip(to_copy, copy_to_host([piece.data for piece in to_copy]), strict=True):
            piece.data = copied
        objects = {key: pieces for key, pieces in by_key.items() if not isinstance(pieces[0], ShardedTensor)}
        self.objects = mcore_to_pyt_state_dict(objects, False)  # they become bytes, so these are copies as well
        self.tensors = {key: pieces for key, pieces in by_key.items() if key not in objects}

    def torch_state(self) -> dict[str, Any]:
        """The captured state in the form that torch.distributed.checkpoint takes. Call once: it hands over the copies.

        It takes as long as the copies did, so the writing thread calls it.
        """
        state = {**self.objects, **mcore_to_pyt_state_dict(self.tensors, False)}
        self.objects, self.tensors = {}, {}
        return state


class _OptimizerCapture:
    """Moments and master weights of one distributed optimizer. Each replica copies its part now; `fill` sends the parts to the first one.

    Megatron would gather them while it describes the state, through three buffers each. Here each replica copies into its place in the
    whole buffer, and the first one, which writes, receives the others' parts into theirs.
    """

    _KEYS = ("param", "exp_avg", "exp_avg_sq")

    def __init__(self, optimizer: Any) -> None:
        self._group: dist.ProcessGroup = optimizer.data_parallel_group_gloo
        self._replica = self._group.rank()
        self._parts: list[Sequence[Tensor]] = []  # one entry per bucket and key; [replica] -> its part
        gathered: dict[Any, Any] = {}
        to_copy: list[tuple[Any, list[Tensor]]] = []  # a parameter, and where its tensors go
        for index, ranges in enumerate(optimizer.gbuf_ranges):
            buffer = optimizer.buffers[index]
            ((dtype, bucket_maps),) = ranges.items()
            # Pages outside this replica's part stay untouched until they are received; nothing reads what lies between parameters.
            # Megatron's own buffers lack the padding behind buckets, but its places of parameters count it: behind a bucket with padding
            # it would save wrong values, or fail.
            tensors = {key: torch.empty(buffer.numel, dtype=torch.float32) for key in self._KEYS}
            gathered[index] = {dtype: tensors}
            sizes = [bucket.grad_data.numel() for bucket in buffer.buckets]
            by_bucket = zip(*(tensor.split(sizes) for tensor in tensors.values()), strict=True)
            for bucket, maps, bucket_tensors in zip(buffer.buckets, bucket_maps, by_bucket, strict=True):
                parts = [tensor.split(bucket.grad_data.numel() // self._group.size()) for tensor in bucket_tensors]
                self._parts += parts
                for parameter, places in maps["param_map"].items():
                    place = places["gbuf_local"]
                    to_copy.append((parameter, [part[self._replica][place.start : place.end] for part in parts]))

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for parameter, targets in to_copy:
                states = optimizer._get_main_param_and_optimizer_states(parameter)  # made now where moments have another dtype
                for key, target in zip(self._KEYS, targets, strict=True):
                    yield target, states[key].float().view(-1)

        copy_into(pairs(), from_cuda=any(buffer.grad_data.is_cuda for buffer in optimizer.buffers))
        self.description = copy.copy(optimizer)
        self.description.get_parameter_state_dp_zero = lambda **_: gathered

    def storages(self) -> set[int]:
        return {part.untyped_storage().data_ptr() for parts in self._parts for part in parts}

    def fill(self, to_fill: set[int]) -> None:
        """Send every part to the first replica, which writes. Collective over the optimizer's gloo group, which nothing else uses."""
        assert self._replica == 0 or not to_fill & self.storages(), "another replica than the first would write what it was not given"
        for parts in self._parts:
            if self._replica == 0:
                received = [dist.irecv(part, group=self._group, group_src=replica) for replica, part in enumerate(parts) if replica]
                for each in received:
                    assert each is not None
                    each.wait()
            else:
                dist.send(parts[self._replica], group=self._group, group_dst=0)
        self._parts.clear()
        del self.description  # it refers to the buffers; the captured state keeps what this rank writes


def capture(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any, *, validate: bool) -> Captured:
    """Collective. Copies this rank's part of the state to host memory; the result writes it to `directory`, the same path on all ranks.

    validate: whether Megatron checks that the shards of all ranks cover each tensor exactly once, and warns where state without tensors
    differs between ranks. All ranks exchange descriptions of all tensors for this. Shards depend on the layout alone, so the first
    checkpoint of a process is enough.

    Megatron's own asynchronous strategy is not used: it forks processes out of one whose communication threads hold locks, does not
    copy tensors that lie on the CPU, and finishes over the default group, in between the collectives of training.
    """
    inner = [_OptimizerCapture(each) for each in inner_optimizers(optimizer)]
    description = inner[0].description
    if hasattr(optimizer, "chained_optimizers"):
        description = copy.copy(optimizer)
        description.chained_optimizers = [each.description for each in inner]
    state = _sharded_state(modules, description, is_loading=False)
    strategy = _copy_tensors(state, incomplete=frozenset().union(*(each.storages() for each in inner)), validate=validate)

    def write(group: dist.ProcessGroup) -> None:
        for each in inner:
            each.fill(strategy.to_fill)
        _write_copies(directory, strategy, group)
        inner.clear()

    return Captured(num_bytes=strategy.num_bytes, write=write)


def capture_model(directory: Path, modules: Sequence[HiddenStateModel], *, validate: bool) -> Captured:
    """Collective. As `capture`, for the model alone: what the result writes is read by `load_model`."""
    strategy = _copy_tensors(_sharded_model(modules), incomplete=frozenset(), validate=validate)
    return Captured(num_bytes=strategy.num_bytes, write=lambda group: _write_copies(directory, strategy, group))


def _copy_tensors(state: dict[str, Any], *, incomplete: frozenset[int], validate: bool) -> _Capture:
    """Collective. Copy this rank's part of a sharded state. incomplete: addresses of storages, see _Capture."""
    strategy = _Capture("torch_dist", 1)
    strategy.incomplete = incomplete
    # The first rank writes the files without tensors alone, in between collectives: to memory, where no disk is full or slow.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        dist_checkpointing.save(state, memory, sharded_strategy=strategy, validate_access_integrity=validate)
        strategy.small_files = {path.name: path.read_bytes() for path in Path(memory).iterdir()}
    return strategy


def _write_copies(directory: Path, strategy: _Capture, group: dist.ProcessGroup) -> None:
    planner = MCoreSavePlanner(dedup_replicated_tensors=not strategy.keep_only_main_replica, flatten_state_dict=False)
    state = strategy.torch_state()
    try:
        write_shards(directory, state, planner, group, small_files=strategy.small_files)
    finally:
        state.clear()  # at once: what torch and Megatron made of the copies may wait for the garbage collector


def write_shards(
    directory: Path,
    state: dict[str, Any],
    planner: torch_checkpoint.SavePlanner,
    group: dist.ProcessGroup,
    *,
    small_files: Mapping[str, bytes],
) -> None:
    """Collective over `group`. This rank's shards into files of its own, on the disk when it returns.

    small_files: name -> content of further files of this rank.
    Raises OSError on every rank when one of them cannot write, with that rank's reason in one line; RuntimeError for any other reason.
    """
    try:
        torch_checkpoint.save(state, storage_writer=ShardWriter(directory, small_files), planner=planner, process_group=group)
    except torch_checkpoint.CheckpointException as error:  # no Exception, and its text is every rank's stack
        failures = [(rank, failure) for rank, (failure, _) in sorted(error.failures.items())]
        reason = " ".join("; ".join(f"rank {rank}: {type(failure).__name__}: {failure}" for rank, failure in failures).split())
        if all(isinstance(failure, OSError) for _, failure in failures):
            raise OSError(reason) from error
        raise RuntimeError(reason) from error


def load(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. Raises ValueError for files that hold anything but a checkpoint, what Megatron raises for a mismatching one."""
    state = _load(directory, modules, _sharded_state(modules, optimizer, is_loading=True))
    optimizer.load_state_dict(state["optimizer"])
    for each in inner_optimizers(optimizer):
        for values in each.optimizer.state.values():
            if "step" in values:
                # All parameters would share one counter, and every step would advance it once per parameter.
                values["step"] = values["step"].clone()
    dist.barrier()


def load_model(directory: Path, modules: Sequence[HiddenStateModel]) -> None:
    """Collective. The model alone, from a checkpoint with or without an optimizer. Errors as `load`."""
    _load(directory, modules, _sharded_model(modules))
    dist.barrier()


def _load(directory: Path, modules: Sequence[HiddenStateModel], sharded: dict[str, Any]) -> dict[str, Any]:
    check_metadata(directory / ".metadata")
    with _tensors_only():
        state = dist_checkpointing.load(sharded, str(directory))
    for index, module in enumerate(modules):
        module.load_state_dict(state[_model_key(modules, index)])
    return state
