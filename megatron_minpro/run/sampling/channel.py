"""Calls between two processes, in both directions: each side offers functions, several calls are under way at once.

A message is a pickle over a Unix socket. The tensors in it travel beside it, in one block of shared memory: no token is pickled.
An exception of a function is raised by the call, with its type, its message and the other side's traceback as a note.
The pickles are trusted: the socket is a pair without a name, and only parent and child hold its ends.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_minpro.run.sampling.shared_tensors import Place, attach, share
from rollout.background import in_background

_HEADER = struct.Struct("<Q")  # bytes of the pickle that follows

# What a message is: a call of a function, its result, or what it raised.
_CALL, _RESULT, _ERROR = "call", "result", "error"


class ChannelClosed(RuntimeError):
    """The other side is gone. Says how it ended."""


class Channel:
    """One end of the connection."""

    def __init__(
        self,
        connection: socket.socket,
        functions: Mapping[str, Callable[..., Any]],
        *,
        other_side: str,
        describe_end: Callable[[], str],
    ) -> None:
        """Call `listen` once everything is there that the functions need.

        Args:
            connection: this side's end of a `socket.socketpair()`.
            functions: what the other side may call. Each call runs in a thread of its own.
            other_side: its name in messages.
            describe_end: how the other side ended, asked once its end of the connection is closed.
        """
        self._connection = connection
        self._functions = functions
        self._other_side = other_side
        self._describe_end = describe_end
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}  # by the number of the call
        self._state = threading.Lock()  # of the two fields around it
        self._end: str | None = None
        self._listener = threading.Thread(target=self._listen, name=f"channel to {other_side}", daemon=True)

    def listen(self) -> None:
        """From now on calls and answers of the other side are taken in."""
        self._listener.start()

    def begin(self, function: str, /, *arguments: Any, **options: Any) -> Future[Any]:
        """Call a function of the other side; the future gets its result, or what it raised. Raises ChannelClosed."""
        number, future = next(self._numbers), Future[Any]()
        with self._state:
            if self._end is not None:
                raise ChannelClosed(self._end)
            self._waiting[number] = future
        try:
            self._send(_Message(_CALL, number, (function, arguments, options)))
        except ConnectionError:
            pass  # the listener finds the end too, and knows how it came
        except BaseException:  # what cannot be sent is not waited for
            with self._state:
                self._waiting.pop(number, None)
            raise
        return future

    def call(self, function: str, /, *arguments: Any, **options: Any) -> Any:
        """Call a function of the other side and wait. Raises what it raises, or ChannelClosed."""
        return self.begin(function, *arguments, **options).result()

    @property
    def awaits_answers(self) -> bool:
        """Whether calls of this side are under way."""
        with self._state:
            return bool(self._waiting)

    def close(self) -> None:
        """End the connection. Calls under way raise ChannelClosed, on both sides."""
        with suppress(OSError):  # the other side has closed it already
            self._connection.shutdown(socket.SHUT_RDWR)

    def wait_until_closed(self) -> None:
        """Returns when either side has closed the connection, or the other process is gone."""
        self._listener.join()

    def _listen(self) -> None:
        try:
            while (message := self._receive()) is not None:
                self._take(*message)
                del message  # the next one may be long in coming, and this one may hold a batch
            end = self._describe_end()
        except BaseException as error:  # or else those who wait would wait for ever
            self.close()
            end = f"the connection to {self._other_side} broke: {type(error).__name__}: {error}"
        with self._state:
            self._end, waiting = end, list(self._waiting.values())
            self._waiting.clear()
        for future in waiting:
            future.set_exception(ChannelClosed(end))

    def _take(self, message: tuple[str, int, tuple[Place, ...], bytes], descriptors: list[int]) -> None:
        kind, number, places, body = message
        content = _decoded(body, places, descriptors)
        if kind == _CALL:
            in_background(partial(self._answer, number, content), name=f"call of {self._other_side}")
            return
        with self._state:
            future = self._waiting.pop(number)
        if isinstance(content, _Undecodable):
            future.set_exception(content.error)
        elif kind == _ERROR:
            future.set_exception(content.restored(self._other_side))
        else:
            future.set_result(content)

    def _answer(self, number: int, content: Any) -> None:
        try:
            if isinstance(content, _Undecodable):
                raise content.error
            function, arguments, options = content
            message = _Message(_RESULT, number, self._functions[function](*arguments, **options))
        except BaseException as error:  # SystemExit of a user's code too: whoever called must know
            message = _Message(_ERROR, number, _Raised(error))
        with suppress(ConnectionError):  # nobody waits for the answer any more
            self._send(message)

    def _send(self, message: _Message) -> None:
        header = _HEADER.pack(len(message.payload))
        try:
            with self._sending:
                sent = socket.send_fds(self._connection, [header], message.descriptors)
                self._connection.sendall(header[sent:] + message.payload)
        finally:
            for descriptor in message.descriptors:
                os.close(descriptor)

    def _receive(self) -> tuple[Any, list[int]] | None:
        """The next message and its file descriptors; None at the end of the connection, also in the middle of a message."""
        descriptors: list[int] = []
        try:
            header = b""
            while len(header) < _HEADER.size:
                part, new, _, _ = socket.recv_fds(self._connection, _HEADER.size - len(header), 1, socket.MSG_CMSG_CLOEXEC)
                header += part
                descriptors += new
                if not part:
                    raise EOFError
            payload = memoryview(bytearray(_HEADER.unpack(header)[0]))
            at = 0
            while at < len(payload):
                count = self._connection.recv_into(payload[at:])
                at += count
                if not count:
                    raise EOFError
        except (EOFError, ConnectionError):
            for descriptor in descriptors:
                os.close(descriptor)
            return None
        return pickle.loads(payload), descriptors


class _Message:
    """A message that is ready to be sent, its tensors in shared memory."""

    def __init__(self, kind: str, number: int, content: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(content)
        places: tuple[Place, ...] = ()
        self.descriptors: list[int] = []
        if pickler.tensors:
            descriptor, places = share(pickler.tensors)
            self.descriptors.append(descriptor)
        self.payload = pickle.dumps((kind, number, places, file.getvalue()), protocol=pickle.HIGHEST_PROTOCOL)


class _Raised:
    """What a function raised, in a form that arrives whatever its type."""

    def __init__(self, error: BaseException) -> None:
        self.type_name, self.message = type(error).__name__, str(error)
        self.traceback = "".join(traceback.format_exception(error))
        try:
            self.pickled = pickle.dumps(error)
        except Exception:  # it may hold anything; its message is sent in any case
            self.pickled = b""

    def restored(self, side: str) -> BaseException:
        """The exception; where its type does not survive the way, a RuntimeError with its type's name and message."""
        try:
            error = pickle.loads(self.pickled)
            arrived = str(error) == self.message  # a class may make its message of its arguments, and does it twice then
        except Exception:  # its class asks for other arguments, or cannot be imported here
            arrived = False
        if not arrived:
            error = RuntimeError(f"{self.type_name}: {self.message}")
        error.add_note(f"In {side}:\n{self.traceback}")
        return error


class _Undecodable:
    """A message whose content this side cannot read."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Pickler(pickle.Pickler):
    """Puts a number in the place of every tensor."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _decoded(body: bytes, places: tuple[Place, ...], descriptors: list[int]) -> Any:
    try:
        tensors = attach(descriptors[0], places) if descriptors else []
        return _Unpickler(io.BytesIO(body), tensors).load()
    except Exception as error:  # a class of the user's own may not load here; the call raises it, the listener lives on
        return _Undecodable(error)
