"""The simulation of sampling: shares worked by hand, a simulation token by token, order statistics, and rolling publish in closed form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from parallel.planner.hardware import read_hardware
from parallel.planner.lengths import exponential
from parallel.planner.published import shape_of
from parallel.planner.rollout_server import RolloutServer, rollout_server
from parallel.planner.sampling import Rollouts, Sampling, share_seconds, simulate_sampling

SHAPE = shape_of("qwen3_30b_a3b")
H100 = read_hardware("h100")
# One second a step whatever it does, and no time for prompts: seconds are steps.
CLOCKWORK = RolloutServer(
    room_tokens=1e9,
    always_read_bytes=0,
    expert_bytes=0,
    expert_share=0,
    cache_bytes=1,
    flops_token=0,
    flops_context=0,
    bytes_per_s=1e18,
    decode_flops_per_s=1e18,
    prefill_flops_per_s=1e18,
    latency_s=1.0,
)


def test_a_share_that_fits_takes_as_many_steps_as_its_longest_response() -> None:
    assert share_seconds(CLOCKWORK, [[10, 700], [4, 3]], prompt_tokens=5) == pytest.approx(700)


def test_with_room_for_one_response_the_steps_add_up() -> None:
    assert share_seconds(replace(CLOCKWORK, room_tokens=100), [[10, 700], [4, 3]], prompt_tokens=5) == pytest.approx(717)


def test_the_prompt_of_a_group_takes_room_once() -> None:
    # 9,000 tokens of one prompt and the 4,096 that SGLang wants free for a second response fit; two prompts do not.
    server = replace(CLOCKWORK, room_tokens=15_000)
    assert share_seconds(server, [[100, 100]], prompt_tokens=9_000) == pytest.approx(100)
    assert share_seconds(server, [[100], [100]], prompt_tokens=9_000) == pytest.approx(200)


def test_prompts_and_interrupted_responses_are_read_again() -> None:
    server = replace(CLOCKWORK, flops_token=1.0, prefill_flops_per_s=1.0, latency_s=0.0)
    assert share_seconds(server, [[10, 10], [10]], prompt_tokens=50) == pytest.approx(2 * 50)  # one prompt a group
    # Both begin at once and 10,000 tokens are full when each has 5,000: the second waits for the first and is read again with its 5,120.
    full = replace(server, room_tokens=10_000)
    assert share_seconds(full, [[8_000], [8_000]], prompt_tokens=1) == pytest.approx(2 * 1 + 1 + 5_120, rel=0.001)


def token_by_token(server: RolloutServer, lengths: Sequence[Sequence[int]], prompt: int) -> float:
    """The same rules, one token after the other: [response, group, tokens to come, tokens done], no heap and no strides."""
    waiting = [[number, group, tokens, 0] for number, (group, tokens) in enumerate((g, t) for g, ts in enumerate(lengths) for t in ts)]
    alive: list[list[int]] = []
    seconds = 0.0

    def used() -> int:
        return sum(response[3] for response in alive) + prompt * len({response[1] for response in alive})

    while waiting or alive:
        while waiting:
            _, group, _, done = waiting[0]
            shared = any(group == response[1] for response in alive)
            if alive and used() + 410 * len(alive) + (0 if shared else prompt) + done + 4096 > server.room_tokens:
                break
            seconds += server.prefill_s(prompt + done) - (server.prefill_s(prompt) if shared else 0.0)
            alive.append(waiting.pop(0))
        context = prompt + sum(response[3] for response in alive) / len(alive) + 0.5
        seconds += server.step_s(len(alive), context)
        for response in alive:
            response[2] -= 1
            response[3] += 1
        alive = [response for response in alive if response[2]]
        while len(alive) > 1 and used() > server.room_tokens:
            leaving = max(alive, key=lambda response: (-response[3], response[0]))
            alive.remove(leaving)
            waiting.append(leaving)
    return seconds


@pytest.mark.parametrize("seed", [0, 1])
def test_a_full_cache_behaves_as_in_a_simulation_token_by_token(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [[min(6000, 1 + int(draw.expovariate(1 / 2000))) for _ in range(4)] for _ in range(12)]
    server = replace(rollout_server(SHAPE, H100, tp=2), room_tokens=20_000)
    expected = token_by_token(server, lengths, 300)
    assert share_seconds(server, lengths, prompt_tokens=300) == pytest.approx(expected, rel=0.03)
    assert expected > 1.4 * share_seconds(replace(server, room_tokens=1e9), lengths, prompt_tokens=300)  # the cache was full


def test_the_last_of_two_servers_takes_the_expected_maximum() -> None:
    two = Sampling(shares_s=(1.0, 2.0), servers=2)
    assert (two.server_s, two.batch_s) == (1.5, 0.25 * 1 + 0.75 * 2)
    assert Sampling(shares_s=(1.0, 2.0), servers=1).batch_s == 1.5


@pytest.mark.parametrize(("training_s", "expected"), [(60.0, 105.0), (150.0, 155.0)])
def test_rolling_with_equal_servers_takes_the_longer_side(training_s: float, expected: float) -> None:
    equal = Sampling(shares_s=(100.0,), servers=4)
    assert equal.rolling_step_s(training_s=training_s, sync_s=5.0) == pytest.approx(expected, rel=0.01)


def test_rolling_hides_the_differences_between_servers() -> None:
    # Each server needs 50 or 150: 100 on average, where 8 servers that wait for each other take nearly 150. A server that is two
    # batches ahead of the slowest waits all the same.
    uneven = Sampling(shares_s=(50.0, 150.0), servers=8)
    assert uneven.batch_s == pytest.approx(150 - 100 / 2**8)
    rolling = uneven.rolling_step_s(training_s=10.0, sync_s=0.0)
    assert 100 <= rolling < 125


def test_sampling_grows_with_length_and_shrinks_with_servers() -> None:
    rollouts = Rollouts(sequences=2048, group_size=8, prompt_tokens=200, lengths=exponential(3000, 8192), servers=8, tp=2)
    server = rollout_server(SHAPE, H100, tp=2)
    base = simulate_sampling(server, rollouts)
    assert simulate_sampling(server, replace(rollouts, servers=16)).batch_s < base.batch_s
    assert simulate_sampling(server, replace(rollouts, lengths=exponential(6000, 8192))).batch_s > base.batch_s
    assert base.server_s < base.batch_s < base.shares_s[-1]


def test_weights_that_leave_no_room_for_the_cache_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.tp: 1 GPUs of h100"):
        rollout_server(shape_of("qwen3_235b_a22b"), H100, tp=1)
