"""Calls between two real processes: tensors, errors, calls in both directions, and what a death leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_minpro.run.sampling.channel import Channel, ChannelClosed
from rollout.client import WeightsMissing

ROOT = Path(__file__).resolve().parents[4]


class Peer:
    """A child process, and this side's end of the channel to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.megatron_minpro.run.sampling.channel_child", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
        theirs.close()
        self.connection = ours
        functions: dict[str, Callable[..., Any]] = {"square": lambda number: number**2}
        self.channel = Channel(ours, functions, other_side="the child", describe_end=self.describe_end)
        self.channel.listen()

    def describe_end(self) -> str:
        return f"the child ended with {self.popen.wait(timeout=10)}"

    def mappings(self) -> int:
        """Blocks of shared memory that this process still holds."""
        return sum("minpro" in region.path for region in psutil.Process().memory_maps(grouped=False))

    def descriptors(self) -> int:
        """Open files of this process."""
        return psutil.Process().num_fds()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.channel.close()
    assert made.popen.wait(timeout=30) == 0, "a side whose peer closes the connection ends"


@pytest.fixture
def doomed() -> Iterator[Peer]:
    """One that a test may kill."""
    made = Peer()
    yield made
    made.popen.kill()
    made.popen.wait()


def test_tensors_arrive_bit_for_bit_and_their_memory_is_given_back(peer: Peer) -> None:
    generator = torch.Generator().manual_seed(0)
    streams = {
        "token_ids": torch.arange(100_003, dtype=torch.int32),
        "engine_logprobs": torch.randn(70_001, generator=generator),
        "nothing": torch.empty(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "bfloat16": torch.randn(17, generator=generator).bfloat16(),
    }
    found = peer.channel.call("count_tokens", streams)
    assert found.keys() == streams.keys()
    for name, stream in streams.items():
        assert (found[name].dtype, found[name].shape) == (stream.dtype, stream.shape)
        assert torch.equal(found[name], stream + 1)
    assert peer.mappings() == 1, "one block for all"
    del found
    assert peer.mappings() == 0


def test_both_sides_call_each_other_at_the_same_time(peer: Peer) -> None:
    slow = peer.channel.begin("sleep", 0.5)
    answers = [peer.channel.begin("ask_back", 20) for _ in range(5)]
    assert [answer.result() for answer in answers] == [[number**2 for number in range(20)]] * 5
    assert not slow.done(), "nobody waits for a slow call of another thread"
    assert slow.result() == "awake"


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("weights", WeightsMissing, "no server holds policy version 3"),
        ("environment", RuntimeError, "environment calculator: p7: ZeroDivisionError: division by zero"),
        ("particular", RuntimeError, "Particular: number 7 is wrong"),
        ("exit", SystemExit, "4"),
    ],
)
def test_an_error_keeps_type_message_and_traceback(kind: str, expected: type[BaseException], message: str, peer: Peer) -> None:
    with pytest.raises(expected) as raised:
        peer.channel.call("fail", kind)
    assert (type(raised.value), str(raised.value)) == (expected, message)
    [note] = raised.value.__notes__
    assert note.startswith("In the child:\nTraceback") and "in fail" in note


def test_what_cannot_travel_is_an_error_of_its_call_alone(peer: Peer) -> None:
    with pytest.raises(Exception, match="lambda"):
        peer.channel.call("unpicklable")
    with pytest.raises(Exception, match="lambda"):
        peer.channel.call("ask_back", lambda: 2)
    with pytest.raises(KeyError, match="no_such_function"):
        peer.channel.call("no_such_function")
    assert peer.channel.call("ask_back", 2) == [0, 1]


def test_a_killed_peer_ends_all_calls_with_the_way_it_ended(doomed: Peer) -> None:
    assert doomed.channel.call("ask_back", 1) == [0]
    waiting = [doomed.channel.begin("sleep", 600) for _ in range(2)]
    doomed.popen.send_signal(signal.SIGKILL)
    for call in waiting:
        with pytest.raises(ChannelClosed, match=r"^the child ended with -9$"):
            call.result(timeout=30)
    with pytest.raises(ChannelClosed, match=r"^the child ended with -9$"):
        doomed.channel.call("ask_back", 1)


def test_a_peer_killed_in_the_middle_of_tensors_leaves_no_memory(doomed: Peer) -> None:
    before = doomed.descriptors()
    big = {"tokens": torch.zeros(20_000_000, dtype=torch.uint8)}
    call = doomed.channel.begin("count_tokens", big)
    time.sleep(0.02)
    doomed.popen.send_signal(signal.SIGKILL)
    with pytest.raises(ChannelClosed):
        call.result(timeout=30)
    assert doomed.mappings() == 0 and doomed.descriptors() <= before
    assert not [name for name in os.listdir("/dev/shm") if "minpro" in name]
