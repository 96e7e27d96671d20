"""How long the servers sample a batch: a small simulation of each server's share, response by response.

The simulation follows the project's client and SGLang's scheduler. The groups of a batch are dealt to the servers in turn. A server
lets a response in while its cache has room. Responses of one group share the keys and values of their prompt. When the cache is full,
the response with the fewest tokens leaves and is read in again later. A share ends with its last response; until then the server
decodes fewer and fewer responses. Lengths are drawn from the distribution with a fixed seed, so a plan repeats.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.planner.lengths import Lengths
from parallel.planner.rollout_server import RolloutServer

_STRIDE = 256  # tokens that are decoded at one speed, unless a response ends before
# SGLang's defaults: a response is let in where 4,096 tokens fit, and is then expected to need a tenth of that.
_WANTED_TOKENS = 4096
_EXPECTED_TOKENS = 410
_SIMULATED_RESPONSES = 12_000
_FEWEST_SHARES, _MOST_SHARES = 8, 64
_ROLLING_BATCHES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """What is sampled in a global step, and by what."""

    sequences: int
    group_size: int  # responses to one prompt; they go to one server
    prompt_tokens: float
    lengths: Lengths  # of responses
    servers: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Seconds that a server needs for its share of a batch: a sample of them, shortest first."""

    shares_s: tuple[float, ...]
    servers: int

    @property
    def server_s(self) -> float:
        """Mean over the servers."""
        return sum(self.shares_s) / len(self.shares_s)

    @property
    def batch_s(self) -> float:
        """Until the last server is done: the expected maximum of as many draws as there are servers."""
        count = len(self.shares_s)
        weights = ((rank + 1) / count for rank in range(count))
        before, expected = 0.0, 0.0
        for share_s, weight in zip(self.shares_s, weights, strict=True):
            below = weight**self.servers
            expected += share_s * (below - before)
            before = below
        return expected

    def rolling_step_s(self, *, training_s: float, sync_s: float) -> float:
        """Seconds of a global step with rolling publish, in the long run.

        A server that is done with its share takes the next version, once there is one, and begins its next share. Step k of the trainer
        begins when batch k-1 is complete, scores it, updates, and offers version k+1.

        Args:
            training_s: of scoring and updates.
            sync_s: of offering a version, and of giving it to one server.
        """
        draw = random.Random(0)
        free_at = [0.0] * self.servers  # when each server is done with its latest share
        offered_at = 0.0
        for _ in range(_ROLLING_BATCHES):
            offered_next_at = max(offered_at, *free_at) + training_s + sync_s
            free_at = [max(free, offered_at) + sync_s + draw.choice(self.shares_s) for free in free_at]
            offered_at = offered_next_at
        return max(offered_at, *free_at) / _ROLLING_BATCHES


@lru_cache(maxsize=256)
def simulate_sampling(server: RolloutServer, rollouts: Rollouts) -> Sampling:
    """Simulate enough shares of a batch for their mean and their differences."""
    draw = random.Random(0)
    groups = -(-rollouts.sequences // rollouts.group_size)
    shares = _SIMULATED_RESPONSES * rollouts.servers // rollouts.sequences
    shares_s = []
    for number in range(min(_MOST_SHARES, max(_FEWEST_SHARES, shares))):
        dealt = range(number % rollouts.servers, groups, rollouts.servers)
        lengths = [draw.choices(rollouts.lengths.tokens, k=rollouts.group_size) for _ in dealt]
        shares_s.append(share_seconds(server, lengths, prompt_tokens=rollouts.prompt_tokens))
    return Sampling(shares_s=tuple(sorted(shares_s)), servers=rollouts.servers)


def share_seconds(server: RolloutServer, lengths: Sequence[Sequence[float]], *, prompt_tokens: float) -> float:
    """Seconds until a server has given all responses of its share.

    Args:
        server: the server.
        lengths: tokens of each response, group by group.
        prompt_tokens: of every prompt.
    """
    cache = _Cache(server.room_tokens, prompt_tokens, [0] * len(lengths))
    waiting = deque(_Response(number, group, tokens) for number, (group, tokens) in enumerate(_in_order(lengths)))
    seconds = 0.0
    while waiting or cache.alive:
        while waiting and (not cache.alive or cache.has_room(waiting[0])):
            response = waiting.popleft()
            seconds += server.prefill_s(prompt_tokens + response.done) - (server.prefill_s(prompt_tokens) if cache.shares(response) else 0)
            cache.add(response)
        stride = min(cache.alive[0][0] - cache.clock, _STRIDE)
        context = prompt_tokens + cache.tokens / len(cache.alive) + stride / 2
        seconds += stride * server.step_s(len(cache.alive), context)
        cache.decode(stride)
        waiting.extend(cache.make_room())
    return seconds


def _in_order(lengths: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    return [(group, tokens) for group, responses in enumerate(lengths) for tokens in responses]


@dataclass(slots=True)
class _Response:
    """tokens: still to come. done: tokens it had when it left the cache last."""

    number: int
    group: int
    tokens: float
    done: float = 0.0


class _Cache:
    """Responses that are decoded together, by a clock that counts tokens: one that was let in at c with d tokens has d + clock - c."""

    def __init__(self, room: float, prompt_tokens: float, alive_of_group: list[int]) -> None:
        self.clock = 0.0
        self.alive: list[tuple[float, int, float, _Response]] = []  # heap: clock at its end, number, its tokens minus clock, response
        self._room = room
        self._prompt_tokens = prompt_tokens
        self._alive_of_group = alive_of_group
        self._num_prompts = 0
        self._offsets = 0.0  # sum over alive

    @property
    def tokens(self) -> float:
        """Of all responses, without their prompts."""
        return self._offsets + len(self.alive) * self.clock

    @property
    def _used(self) -> float:
        return self.tokens + self._num_prompts * self._prompt_tokens

    def shares(self, response: _Response) -> bool:
        """Whether the response's prompt is in the cache."""
        return self._alive_of_group[response.group] > 0

    def has_room(self, response: _Response) -> bool:
        """Whether it may come in, those that are in growing as expected."""
        prompt = 0 if self.shares(response) else self._prompt_tokens
        return self._used + len(self.alive) * _EXPECTED_TOKENS + prompt + response.done + _WANTED_TOKENS <= self._room

    def add(self, response: _Response) -> None:
        """Let it in."""
        offset = response.done - self.clock
        heapq.heappush(self.alive, (self.clock + response.tokens, response.number, offset, response))
        self._offsets += offset
        self._num_prompts += not self.shares(response)
        self._alive_of_group[response.group] += 1

    def decode(self, tokens: float) -> None:
        """So many for each; those that end leave."""
        self.clock += tokens
        while self.alive and self.alive[0][0] <= self.clock:
            self._forget(heapq.heappop(self.alive))

    def make_room(self) -> list[_Response]:
        """Those that must leave before their end: fewest tokens first, the latest of these first; one stays in any case."""
        if self._used <= self._room:
            return []
        self.alive.sort(key=lambda entry: (-entry[2], entry[1]))
        left = []
        while len(self.alive) > 1 and self._used > self._room:
            entry = self.alive.pop()
            self._forget(entry)
            end, _, offset, response = entry
            response.tokens, response.done = end - self.clock, offset + self.clock
            left.append(response)
        heapq.heapify(self.alive)
        return left

    def _forget(self, entry: tuple[float, int, float, _Response]) -> None:
        _, _, offset, response = entry
        self._offsets -= offset
        self._alive_of_group[response.group] -= 1
        self._num_prompts -= not self.shares(response)
