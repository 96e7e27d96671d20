"""Process groups without other processes: each remembers its ranks, what it is called, and the backend that was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.rehearsal.tally import CollectiveKey

# Megatron-Core's description of a group -> what it is called here.
_LABELS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp x ep",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp x cp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp x cp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",
    "EMBEDDING_GROUP": "embedding",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    backend: str
    label: str


class FakeGroups:
    """Stands in for torch.distributed's ways to make groups and to exchange objects.

    answer(object, rank): what another rank would hand over where this one hands over `object`. heard(): what the source of a broadcast
    would say to this rank. observe(key): an exchange of objects.
    """

    def __init__(self, answer: Callable[[Any, int], Any], heard: Callable[[], Any], observe: Callable[[CollectiveKey], None]) -> None:
        self._answer = answer
        self._heard = heard
        self._observe = observe
        self._known: dict[str, _Group] = {}
        self._default_backend = "gloo"
        self._init, self._new_group = dist.init_process_group, dist.new_group

    def install(self) -> None:
        """From now on groups are fake."""
        stand_ins = {
            "init_process_group": self._init_process_group,
            "new_group": self._make_group,
            "all_gather_object": self._all_gather_object,
            "broadcast_object_list": self._broadcast_object_list,
            "barrier": self._barrier,
        }
        for name, stand_in in stand_ins.items():
            setattr(dist, name, stand_in)

    def key(self, kind: str, group: dist.ProcessGroup | None) -> CollectiveKey:
        """Kind, group and backend of a collective."""
        where = group if group is not None else dist.group.WORLD
        assert where is not None
        known = self._known[where.group_name]
        return CollectiveKey(kind=kind, group=known.label, size=where.size(), backend=known.backend)

    def _init_process_group(self, backend: str, **_: Any) -> None:
        self._known.clear()
        self._default_backend = backend
        self._init("fake", store=FakeStore(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        assert dist.group.WORLD is not None
        self._known[dist.group.WORLD.group_name] = _Group(backend=backend, label="all ranks")

    def _make_group(self, ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        description = options.get("group_desc")
        made = self._new_group(ranks, backend="fake", group_desc=description)
        if isinstance(made, dist.ProcessGroup):
            label = _LABELS.get(description, description) if description else f"{'all' if ranks is None else len(ranks)} ranks"
            self._known[made.group_name] = _Group(backend=backend or self._default_backend, label=label)
        return made

    def _all_gather_object(self, object_list: list[Any], obj: Any, group: dist.ProcessGroup | None = None) -> None:
        self._observe(self.key("all_gather_object", group))
        where = group if group is not None else dist.group.WORLD
        me = dist.get_rank()
        for index, rank in enumerate(dist.get_process_group_ranks(where)):
            object_list[index] = obj if rank == me else self._answer(obj, rank)

    def _broadcast_object_list(self, object_list: list[Any], src: int | None = None, group: Any = None, **_: Any) -> None:
        self._observe(self.key("broadcast_object_list", group))
        if len(object_list) == 1 and object_list[0] is None and src != dist.get_rank():
            object_list[0] = self._heard()

    def _barrier(self, group: dist.ProcessGroup | None = None, **_: Any) -> None:
        self._observe(self.key("barrier", group))
