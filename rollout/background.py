"""Calls in daemon threads: unlike an executor's threads, they do not delay the exit of the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_background(work: Callable[[], Result], *, name: str) -> Future[Result]:
    """Run `work` in a daemon thread called `name`; the future holds its result or its exception."""
    future: Future[Result] = Future()
    threading.Thread(target=_resolve, args=(future, work), name=name, daemon=True).start()
    return future


def _resolve(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        result = work()
    except BaseException as error:  # handed to whoever asks for the result
        future.set_exception(error)
    else:
        future.set_result(result)
