"""What one member of a trial does, on one GPU or on the CPU. It needs torch alone, so trainer and server environments run the same code."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from rollout.trial.events import Event, Plan, Stage
from rollout.weights.broadcast_group import BroadcastGroup
from rollout.weights.broadcast_member import receive

_PORT_KEY = "broadcast/port"
_GROUP_NAME = "trial"
_BROADCAST_NUMBERS = 1 << 20  # fp32: 4 MiB
_POLL_S = 0.02
_SIDE = 512  # of the matrices that are multiplied


class Member:
    """One member of this node. number: 0 is the node's first; it computes on the device of that number. write: takes lines."""

    def __init__(self, number: int, role: Literal["trainer", "server"], *, write: Callable[[str], None]) -> None:
        self._number = number
        self._write = write
        self._role = role
        self._device = torch.device("cpu")

    def run(self, read_plan: Callable[[], str]) -> bool:
        """Compute, wait for the plan, take part. False as soon as a stage has failed. read_plan: "" when there is none."""
        if not self._attempt("device", self._compute):
            return False
        line = read_plan()
        plan = Plan.from_line(line) if line else None
        if plan is None or self._number >= plan.members:
            return True
        if self._role == "server":
            return self._attempt("weight broadcast", lambda: self._receive(plan))
        if not self._add_up(plan):
            return False
        return plan.first + self._number != 0 or not plan.receivers or self._attempt("weight broadcast", lambda: self._send(plan))

    def _attempt(self, stage: Stage, action: Callable[[], None]) -> bool:
        self._say(stage, "began")
        try:
            action()
        except Exception as error:  # whatever torch, CUDA, gloo or NCCL raise is the finding
            self._say(stage, "failed", error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return False
        self._say(stage, "done")
        return True

    def _say(self, stage: Stage, state: Literal["began", "done", "failed"], *, error: str | None = None) -> None:
        cuda = stage == "device" and state != "began" and torch.cuda.is_initialized()
        event = Event(
            member=self._number,
            stage=stage,
            state=state,
            error=error,
            devices=torch.cuda.device_count() if cuda else 0,
            device=torch.cuda.get_device_name(self._device) if cuda and self._device.type == "cuda" else "CPU",
        )
        self._write(event.to_line())

    def _compute(self) -> None:
        """Multiply small whole numbers, whose product is exact in float32, and compare with the same in integers on the CPU."""
        if torch.cuda.is_available():
            torch.cuda.init()
            if self._number >= torch.cuda.device_count():
                raise RuntimeError(f"there is no such GPU: this node shows {torch.cuda.device_count()}")
            self._device = torch.device("cuda", self._number)
            torch.cuda.set_device(self._device)
        numbers = torch.arange(_SIDE * _SIDE).reshape(_SIDE, _SIDE) % 7
        product = (numbers.float().to(self._device) @ numbers.T.float().to(self._device)).cpu()
        if not torch.equal(product, (numbers @ numbers.T).float()):
            raise RuntimeError("a product of small whole numbers is wrong")

    def _add_up(self, plan: Plan) -> bool:
        """Over gloo, as the control group of every step, and with GPUs over NCCL."""
        rank = plan.first + self._number
        if not self._attempt("sum over gloo", lambda: _join_and_sum(plan, rank)):
            return False
        if plan.backend == "nccl" and not self._attempt("sum over NCCL", lambda: _check_sum(rank, plan.ranks, self._device)):
            return False
        # A rank that ends takes buffers with it that others may still read. The group is left by ending: leaving can wait for a lost rank.
        _count_in(_store(plan), "added up", plan.ranks, plan.timeout_s)
        return True

    def _send(self, plan: Plan) -> None:
        """With the weight sync's own group."""
        group = BroadcastGroup(
            name=_GROUP_NAME,
            world_size=1 + plan.receivers,
            backend=plan.backend,
            master_address=plan.master_address,
            timeout_s=plan.timeout_s,
            broadcast_s=plan.timeout_s,
        )
        store = _store(plan)
        store.set(_PORT_KEY, str(group.port))
        group.join()
        group.broadcast(_pattern(group.device)).wait()
        if plan.backend == "nccl":
            torch.cuda.synchronize()
        if not _count_in(store, "received", 1 + plan.receivers, plan.timeout_s):
            raise RuntimeError("not all of the servers' GPUs confirmed the tensor")
        group.close()

    def _receive(self, plan: Plan) -> None:
        store = _store(plan)
        store.wait([_PORT_KEY], datetime.timedelta(seconds=plan.timeout_s))
        received = receive(
            torch.empty(_BROADCAST_NUMBERS, device=self._device),
            name=_GROUP_NAME,
            rank=1 + plan.first + self._number,
            world_size=1 + plan.receivers,
            backend=plan.backend,
            master_address=plan.master_address,
            master_port=int(store.get(_PORT_KEY)),
            timeout_s=plan.timeout_s,
        )
        if not torch.equal(received, _pattern(self._device)):
            raise RuntimeError("the broadcast tensor did not arrive as it was sent")
        store.add("received", 1)


def _pattern(device: torch.device) -> torch.Tensor:
    return torch.arange(_BROADCAST_NUMBERS, dtype=torch.float32, device=device)  # whole numbers below 2**24: exact


def _store(plan: Plan) -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=plan.timeout_s)
    return dist.TCPStore(plan.store_address, plan.store_port, is_master=False, wait_for_workers=False, timeout=timeout)


def _count_in(store: dist.TCPStore, what: str, members: int, timeout_s: float) -> bool:
    """Add one to a number and wait until all members have done so. False when some had not in time."""
    deadline = time.monotonic() + timeout_s
    store.add(what, 1)
    while store.add(what, 0) < members:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _join_and_sum(plan: Plan, rank: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if plan.backend == "nccl" else "cpu:gloo"
    timeout = datetime.timedelta(seconds=plan.timeout_s)
    store = dist.PrefixStore("sum", _store(plan))
    dist.init_process_group(backend, store=store, rank=rank, world_size=plan.ranks, timeout=timeout)
    _check_sum(rank, plan.ranks, torch.device("cpu"))


def _check_sum(rank: int, ranks: int, device: torch.device) -> None:
    total = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(total)
    expected = ranks * (ranks + 1) / 2
    if float(total) != expected:
        raise RuntimeError(f"the sum is {float(total):g}, expected {expected:g}")
