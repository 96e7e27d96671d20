"""The other side of the channel in the tests: a process that offers a few functions, and can call back."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import torch

from megatron_minpro.run.sampling.channel import Channel
from rollout.client import WeightsMissing


class Particular(Exception):
    """Its message is made of its arguments, so a pickle of it says something else."""

    def __init__(self, number: int) -> None:
        super().__init__(f"number {number} is wrong")


def count_tokens(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: stream + 1 for name, stream in batch.items()}


def ask_back(times: int) -> list[int]:
    """What the caller's own function says, asked once more each time."""
    return [channel.call("square", number) for number in range(times)]


def fail(kind: str) -> None:
    if kind == "weights":
        raise WeightsMissing("no server holds policy version 3")
    if kind == "particular":
        raise Particular(7)
    if kind == "exit":
        sys.exit(4)
    raise RuntimeError("environment calculator: p7: ZeroDivisionError: division by zero")


def unpicklable() -> Any:
    return lambda: None


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    functions = {f.__name__: f for f in (count_tokens, ask_back, fail, unpicklable, sleep)}
    channel = Channel(connection, functions, other_side="the test", describe_end=lambda: "the test has ended")
    channel.listen()
    channel.wait_until_closed()
    os._exit(0)
