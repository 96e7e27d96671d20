"""An event loop of its own thread, in which coroutines of several threads run at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundLoop:
    """Runs until `close`. Its thread is a daemon: it does not delay the exit of the interpreter."""

    def __init__(self, *, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run it to its end, as `asyncio.run` does, while others may run too. What ends the waiting (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop; what still runs in it is dropped."""
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _work(self) -> None:
        while not self._closed:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):  # of a coroutine: asyncio hands it to whoever waits, and ends the loop by it too
                continue
