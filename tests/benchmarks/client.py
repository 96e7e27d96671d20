"""The client's CPU time, memory and longest block for a production step of 4,096 responses, against Python's json on the same bodies.

A server in a process of its own replays recorded answers. Everything from the socket to the Generation is the project's own code.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recorded_server import recorded_body
from rows import Row, median_seconds

from rollout.client import GenerationClient
from rollout.records import Generation, GenerationRequest, SamplingParams

RESPONSES, TOKENS = 4096, 8000  # of a step of configs/qwen3_30b_a3b_minpro.yaml
PER_CALL = 8
CALLS = 8  # measured; the rest of the step is more of the same
LONGEST = 20_480  # tokens: the longest responses that are allowed
BLOCK_S = 0.05
_HERE = Path(__file__).resolve().parent
_SAMPLING = SamplingParams(max_new_tokens=LONGEST, temperature=1.0, top_p=1.0, top_k=-1, stop_token_ids=(), seed=0)
_SCALE = RESPONSES / (PER_CALL * CALLS)


def rows(_folder: Path) -> list[Row]:
    """The rows of this file."""
    body = recorded_body(PER_CALL, TOKENS)
    with recorded(TOKENS) as client:
        ours_s = cpu_seconds(lambda: answers(client))
        held, peak = held_bytes(lambda: answers(client, calls=1))
    plain_s = cpu_seconds(lambda: [plainly(body) for _ in range(CALLS)])
    plain_held, _ = held_bytes(lambda: plainly(body))
    tokens = PER_CALL * TOKENS
    with recorded(LONGEST) as client:
        block_s = longest_block(client)
    return [
        Row(
            name=f"one core for {RESPONSES:,} responses of {TOKENS:,} tokens, socket to record; bytes held a token "
            f"(at most {peak / tokens:.0f} while a call is read)",
            seconds=_SCALE * ours_s,
            peer="json into tuples",
            peer_seconds=_SCALE * plain_s,
            target=0.4,
            own_bytes=round(held / tokens),
            peer_bytes=round(plain_held / tokens),
            bytes_target=0.4,
        ),
        Row(
            name=f"longest block of the event loop, calls of {PER_CALL} responses of {LONGEST:,} tokens",
            seconds=block_s,
            peer="its limit",
            peer_seconds=BLOCK_S,
            target=1.0,
        ),
    ]


@contextmanager
def recorded(num_tokens: int) -> Iterator[GenerationClient]:
    """A client of a server that answers each call with the same responses of so many tokens."""
    command = [sys.executable, str(_HERE / "recorded_server.py"), str(PER_CALL), str(num_tokens)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield GenerationClient(
            [process.stdout.readline().strip()], request_timeout_s=600, max_retries=0, max_in_flight=2 * PER_CALL, samples_per_call=PER_CALL
        )
        process.stdin.close()


def _requests(calls: int) -> list[GenerationRequest]:
    return [GenerationRequest(request_id=str(number), prompt_token_ids=tuple(range(200))) for number in range(calls)]


def answers(client: GenerationClient, *, calls: int = CALLS) -> list[list[Generation]]:
    """The responses of so many calls, two of them under way at once."""
    return client.generate(_requests(calls), _SAMPLING, num_samples=PER_CALL)


def plainly(body: bytes) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Token ids and log-probs of a body by Python's json, as tuples."""
    return [
        (tuple(answer["output_ids"]), tuple(logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]))
        for answer in json.loads(body)
    ]


def cpu_seconds(function: Callable[[], object]) -> float:
    """Median CPU seconds of this process."""
    times: list[float] = []

    def timed() -> None:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)

    median_seconds(timed, repeats=5)
    return sorted(times[1:])[2]


def held_bytes(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes of what a function returns, and the most it held meanwhile."""
    function()  # what is kept once, such as the vocabulary, is there now
    gc.collect()
    tracemalloc.start()
    try:
        result = function()
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
        del result
        return held, peak
    finally:
        tracemalloc.stop()


def longest_block(client: GenerationClient) -> float:
    """Most CPU seconds of the event loop's thread between two turns of a coroutine that asks for one every millisecond."""

    async def ask() -> float:
        longest = 0.0

        async def beat() -> None:
            nonlocal longest
            while True:
                start = time.thread_time()  # not the wall: other processes may have the core meanwhile
                await asyncio.sleep(0.001)
                longest = max(longest, time.thread_time() - start)

        async with client.session(_SAMPLING, policy_version=None) as session:
            beating = asyncio.create_task(beat())
            requests = [
                GenerationRequest(request_id=f"{call}", sample_index=index, prompt_token_ids=(1,) * 200)
                for call in range(4)
                for index in range(PER_CALL)
            ]
            await session.generate(requests)
            beating.cancel()
        return longest

    return client.run(ask())
