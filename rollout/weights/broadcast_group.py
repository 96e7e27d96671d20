"""The trainer's membership in the process group through which SGLang servers receive weights. SGLang is not imported.

SGLang's `init_custom_process_group` makes a TCP store in which every member counts itself in, and a backend whose keys lie under the
prefixes "<group>", "<group>/" and "<device>/". The same is built here from torch's own classes, beside and independent of the trainer's
default process group and of a launcher's store (under torchrun `torch.distributed.rendezvous` would silently join the latter).
"""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
from concurrent.futures import wait
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.background import in_background
from rollout.loopback import is_loopback

Backend = Literal["gloo", "nccl"]
DEVICE_TYPE = {"gloo": "cpu", "nccl": "cuda"}
_ABORT_S = 5.0


class _Broadcaster(Protocol):
    """What both backends can do; torch's stubs leave out `broadcast`."""

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> dist.Work: ...
    def abort(self) -> None: ...


class BroadcastGroup:
    """Rank 0 of a group of 1 + (servers x tp) members. Make it, tell the servers its `port`, then `join`.

    master_address: this host, as the servers reach it (rollout.routes finds it); store and gloo listen there and nowhere else.
    timeout_s: of joining. broadcast_s: torch's own limit of a broadcast. With NCCL its watchdog ends the whole process then: whoever is to
    outlive a failure keeps a shorter time and calls `close`.
    Raises ValueError for an address that is not this host's, and for a name that means a loopback address here: for the servers it means
    another one.
    """

    def __init__(self, *, name: str, world_size: int, backend: Backend, master_address: str, timeout_s: float, broadcast_s: float) -> None:
        if backend not in DEVICE_TYPE:
            raise ValueError(f"weight sync backend is {backend!r}, expected gloo or nccl")
        self.name = name
        self.world_size = world_size
        self.backend = backend
        self.master_address = master_address
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._broadcast_limit = datetime.timedelta(seconds=broadcast_s)
        # A socket of our own: by itself the store would listen on every interface, and whoever reaches it could read and write in it.
        listener = _listen(master_address)
        self._address: str = listener.getsockname()[0]
        # Not waiting: the servers do not know the port yet. The store closes the socket at its own end.
        self._master: dist.TCPStore | None = dist.TCPStore(
            master_address,
            listener.getsockname()[1],
            world_size,
            True,
            self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._store: dist.Store | None = None
        self._group: _Broadcaster | None = None

    @property
    def port(self) -> int:
        assert self._master is not None, "closed"
        return self._master.port

    @property
    def device(self) -> torch.device:
        """Where a tensor must be to be broadcast."""
        return torch.device("cpu") if self.backend == "gloo" else torch.device("cuda", torch.cuda.current_device())

    def join(self) -> None:
        """Blocks until every server has joined. Raises torch's DistStoreError or RuntimeError after the time limit."""
        # This second handle counts this member in, and returns when all are counted, as each server's does.
        counted = dist.TCPStore(
            self.master_address, self.port, self.world_size, False, self._timeout, wait_for_workers=True, multi_tenant=True
        )
        store = dist.PrefixStore(self.name, counted)
        self._store = dist.PrefixStore(f"{DEVICE_TYPE[self.backend]}/", dist.PrefixStore(f"{self.name}/", store))
        if self.backend == "gloo":
            gloo: Any = dist.ProcessGroupGloo  # torch's stubs know neither its _Options nor the constructor that takes them
            gloo_options = gloo._Options()
            gloo_options._timeout = self._broadcast_limit
            # By itself gloo listens at the address of this machine's name, which may be a loopback address that servers cannot reach.
            gloo_options._devices = [gloo.create_device(hostname=self._address)]
            self._group = gloo(self._store, 0, self.world_size, gloo_options)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._broadcast_limit
            self._group = cast(_Broadcaster, dist.ProcessGroupNCCL(self._store, 0, self.world_size, options))

    def broadcast(self, tensor: Tensor) -> dist.Work:
        """Start sending `tensor` (contiguous, on `device`) to all members."""
        assert self._group is not None, "join() first"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        return self._group.broadcast([tensor], options)

    def close(self) -> None:
        """Leave, without waiting for anybody: a server that hangs would be waited for until the time limit.

        The store ends too: servers that still wait in it for others to join get an error instead of their own time limit.
        """
        left: list[Any] = [self._group, self._store, self._master]
        self._group = self._store = self._master = None
        if left[0] is not None:
            # It takes milliseconds; a communicator that is just being made may not answer at all.
            wait([in_background(left[0].abort, name="weight sync abort")], timeout=_ABORT_S)
        # Destructors wait for threads, connections and what is under way. They run where the last reference goes: beside us.
        threading.Thread(target=left.clear, daemon=True).start()


def _listen(address: str) -> socket.socket:
    """A listening socket at one address of this host. Port 0: the system chooses one, so there is no race for it."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(where[0]).is_loopback and not is_loopback(address):
            raise ValueError(
                f"weight sync master address {address!r}: means {where[0]} on this host, which servers on others cannot reach; expected an "
                f"address of this host"
            )
        listener = socket.socket(family)
        try:
            listener.bind(where)
            listener.listen(socket.SOMAXCONN)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(
            f"weight sync master address {address!r}: cannot listen there ({error.strerror}), expected an address of this host"
        ) from error
    return listener
