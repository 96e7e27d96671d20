"""One loop, several threads that wait in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from rollout.background import in_background
from rollout.event_loop import BackgroundLoop


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    loop = BackgroundLoop(name="test")
    yield loop
    loop.close()


def test_coroutines_of_two_threads_run_at_the_same_time(loop: BackgroundLoop) -> None:
    met = asyncio.Barrier(2)

    async def meet(name: str) -> str:
        await asyncio.wait_for(met.wait(), 10)
        return name + threading.current_thread().name

    other = in_background(lambda: loop.run(meet("b in ")), name="other")
    assert (loop.run(meet("a in ")), other.result(10)) == ("a in test", "b in test")


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit("enough"), KeyboardInterrupt()])
def test_what_a_coroutine_raises_comes_out_and_the_loop_goes_on(loop: BackgroundLoop, error: BaseException) -> None:
    async def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        loop.run(fail())
    assert loop.run(asyncio.sleep(0, "alive")) == "alive"


def test_a_closed_loop_leaves_no_thread(loop: BackgroundLoop) -> None:
    one = BackgroundLoop(name="to be closed")
    one.close()
    assert "to be closed" not in {thread.name for thread in threading.enumerate()}
