"""Servers that change their weights one by one: who gets which version when, and who takes the share of a server that is gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from rollout.background import in_background
from rollout.client import GenerationClient, RolloutFailed
from rollout.records import Generation
from rollout.weights.weight_sync import WeightSyncFailed
from tests.rollout.generate_stub import REQUESTS, SAMPLING, Answer, Stub, answers_of

SLOW_S = 0.4


class Fleet:
    """Stub servers, the weights that each is given, and everything that happens to them, in order."""

    def __init__(self, make: Callable[[Answer], Stub], *, slow: tuple[str, ...] = (), **changes: Any) -> None:
        self.happened: list[tuple[str, str, int]] = []  # (server, what, policy version)
        self.refusals: list[str] = []  # servers that do not take weights; one entry for each time
        self.dying: set[str] = set()  # servers that end at their next call
        self.servers = {name: make(self.answer_of(name, SLOW_S if name in slow else 0.0)) for name in "ab"}
        self.names = {server.endpoint: name for name, server in self.servers.items()}
        for server in self.servers.values():
            server.version = "0"
        options = {"request_timeout_s": 10, "max_retries": 3, "max_in_flight": 100, "backoff_s": 0.01, "wait_s": 0.6, **changes}
        self.client = GenerationClient(list(self.names), give=self.give, **options)

    def answer_of(self, name: str, seconds: float) -> Answer:
        def answer(body: dict[str, Any]) -> tuple[int, Any]:
            server = self.servers[name]
            version = int(server.version or -1)
            self.happened.append((name, "asked", version))
            if name in self.dying:
                server.version = None
                return 500, {"error": "killed"}
            time.sleep(seconds)
            assert server.version == str(version), "weights changed under a call"
            return answers_of(version)(body)

        return answer

    def give(self, endpoint: str, version: int) -> None:
        name = self.names[endpoint]
        if self.servers[name].version is None:
            raise WeightSyncFailed(f"policy version {version}: no server answers: {endpoint}")
        if name in self.refusals:
            self.refusals.remove(name)
            raise WeightSyncFailed(f"policy version {version}: no server took it: {endpoint}: out of memory")
        assert self.servers[name].active == 0, "weights change on a server that nothing is asked of"
        self.servers[name].version = str(version)
        self.happened.append((name, "given", version))

    def sample(self, version: int, *, num_samples: int = 1) -> Future[list[list[Generation]]]:
        def work() -> list[list[Generation]]:
            sampling = replace(SAMPLING, seed=version)
            return self.client.generate(REQUESTS, sampling, num_samples=num_samples, policy_version=version)

        return in_background(work, name=f"batch under version {version}")

    def wait_until(self, *happened: tuple[str, str, int]) -> None:
        deadline = time.monotonic() + 10
        while not set(happened) <= set(self.happened):
            assert time.monotonic() < deadline, self.happened
            time.sleep(0.005)

    def of(self, name: str) -> list[tuple[str, int]]:
        return [(what, version) for server, what, version in self.happened if server == name]


@pytest.fixture
def fleet(stub: Callable[[Answer], Stub], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    monkeypatch.setattr("rollout.rolling_gate._LOOK_AGAIN_S", 0.05)
    made: list[Fleet] = []

    def make(**options: Any) -> Fleet:
        made.append(Fleet(stub, **options))
        return made[-1]

    yield make
    for one in made:
        one.client.close()


def assert_whole(batch: Future[list[list[Generation]]], version: int) -> None:
    rows = batch.result(20)
    assert [row[0].request_id for row in rows] == [request.request_id for request in REQUESTS]
    assert {generation.policy_versions for row in rows for generation in row} == {(version, version)}


def test_a_server_takes_new_weights_while_another_ends_the_older_batch(fleet: Callable[..., Fleet]) -> None:
    servers = fleet(slow=("b",))
    first = servers.sample(4)
    servers.wait_until(("a", "asked", 4), ("b", "asked", 4))
    second = servers.sample(8)
    servers.wait_until(("a", "asked", 8))
    assert not first.done() and servers.of("b") == [("given", 4), ("asked", 4)], "b still samples the older batch"
    assert_whole(first, 4)
    assert_whole(second, 8)
    assert servers.of("a") == servers.of("b") == [("given", 4), ("asked", 4), ("given", 8), ("asked", 8)]
    report = servers.client.last_report
    assert report["servers/retries"] == 0 and 0 < report["time/servers_wait"] < SLOW_S


def test_a_conversation_keeps_its_server_from_newer_weights(fleet: Callable[..., Fleet]) -> None:
    servers = fleet()
    answered, go_on = threading.Event(), asyncio.Event()

    async def talk() -> list[Generation]:
        async with servers.client.session(SAMPLING, policy_version=4) as session:
            session.begin(request.request_id for request in REQUESTS)
            await session.generate(REQUESTS)
            for request in REQUESTS[1::2]:
                session.end(request.request_id)  # those of server b
            answered.set()
            await go_on.wait()
            later = await session.generate([replace(request, turn=1) for request in REQUESTS[::2]])
            for request in REQUESTS[::2]:
                session.end(request.request_id)
            return later

    first = in_background(lambda: servers.client.run(talk()), name="conversations")
    assert answered.wait(10)
    second = servers.sample(8)
    servers.wait_until(("b", "asked", 8))
    assert servers.of("a") == [("given", 4), ("asked", 4)]

    async def release() -> None:
        go_on.set()

    servers.client.run(release())
    assert {generation.policy_versions for generation in first.result(10)} == {(4, 4)}
    assert_whole(second, 8)
    assert servers.of("a") == [("given", 4), ("asked", 4), ("asked", 4), ("given", 8), ("asked", 8)]


def test_the_older_share_of_a_dead_server_is_finished_by_another(fleet: Callable[..., Fleet]) -> None:
    servers = fleet()

    def die(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(SLOW_S)
        servers.servers["a"].version = None  # it never comes back
        return 500, {"error": "killed"}

    servers.servers["a"].answer = die
    first = servers.sample(4)
    servers.wait_until(("b", "asked", 4))
    second = servers.sample(8)
    servers.wait_until(("b", "asked", 8))
    assert_whole(first, 4)
    assert_whole(second, 8)
    # Its own share of both, a's share of the older batch under the older weights, and a's share of the newer one.
    assert [step for step in servers.of("b") if step[0] == "given"] == [("given", 4), ("given", 8), ("given", 4), ("given", 8)]
    assert servers.of("b")[-2:] == [("given", 8), ("asked", 8)]
    assert sum(generation.num_retries for row in first.result() for generation in row) == 3


def test_a_restarted_server_is_given_what_is_wanted_of_it_at_once(fleet: Callable[..., Fleet]) -> None:
    servers = fleet(slow=("b",))
    assert_whole(servers.sample(4), 4)
    servers.servers["a"].version = "-1"  # restarted between two batches
    assert_whole(servers.sample(4), 4)
    assert servers.of("a") == [("given", 4), ("asked", 4), ("given", 4), ("asked", 4)]
    assert servers.client.last_report["servers/retries"] == 0
    servers.dying.add("a")
    first = servers.sample(8)  # a dies, b takes both shares, one after the other
    servers.wait_until(("a", "asked", 8), ("b", "asked", 8))
    second = servers.sample(12)
    time.sleep(0.1)
    servers.dying.clear()
    servers.servers["a"].version = "-1"  # restarted in the middle
    servers.wait_until(("a", "asked", 12))
    assert not first.done(), "b has not finished the older batch, a works on the next one"
    assert_whole(first, 8)
    assert_whole(second, 12)


def test_a_server_that_hangs_is_given_no_weights_and_no_call(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.rolling_gate.SILENT_LOOK_TIMEOUT_S", 0.2)
    servers = fleet()
    servers.servers["b"].computes.clear()  # its HTTP process still tells its version
    assert_whole(servers.sample(4), 4)
    assert servers.of("a") == [("given", 4), ("asked", 4), ("asked", 4)], "a has done both shares"
    assert servers.of("b") == [] and servers.client.last_report["servers/silent"] == 1
    servers.servers["b"].computes.set()
    assert_whole(servers.sample(8), 8)
    assert servers.of("b") == [("given", 8), ("asked", 8)] and servers.client.last_report["servers/silent"] == 0


def test_a_version_that_somebody_else_gave_is_not_trusted(fleet: Callable[..., Fleet]) -> None:
    servers = fleet()  # of an earlier run or attempt: its weights of that version were others, or a publish was cut off
    servers.servers["a"].version = "4"
    assert_whole(servers.sample(4), 4)
    assert servers.of("a") == servers.of("b") == [("given", 4), ("asked", 4)]
    assert_whole(servers.sample(4), 4)
    assert servers.of("a") == [("given", 4), ("asked", 4), ("asked", 4)], "what this client gave is not given again"


def test_a_server_that_takes_no_weights_is_left_out_after_three_times(fleet: Callable[..., Fleet]) -> None:
    servers = fleet()
    servers.refusals = ["a"]
    assert_whole(servers.sample(4), 4)
    assert servers.of("b") == [("given", 4), ("asked", 4), ("asked", 4)], "b has done both shares"
    assert_whole(servers.sample(8), 8)
    assert servers.of("a") == [("given", 8), ("asked", 8)]
    servers.refusals = ["a", "b"] * 3
    with pytest.raises(RolloutFailed, match=r"^no server answered within 0.6 s: http://\S*: policy version 12: .*out of memory; http"):
        servers.sample(12).result(20)


def test_no_server_takes_newer_weights_while_calls_are_not_assigned(fleet: Callable[..., Fleet]) -> None:
    servers = fleet(slow=("b",), samples_per_call=1, max_in_flight=2, assignment="least_outstanding")
    batches = [servers.sample(4)]
    servers.wait_until(("a", "asked", 4))
    batches.append(servers.sample(8))
    for batch, version in zip(batches, (4, 8), strict=True):
        assert_whole(batch, version)
    assert servers.of("a").count(("asked", 4)) > servers.of("b").count(("asked", 4)) > 0
    for name in "ab":
        given = [version for what, version in servers.of(name) if what == "given"]
        assert given in ([4, 8], [4]), "each changes its weights at most once a batch"


def test_two_batches_of_one_version_are_never_on_a_server_together(fleet: Callable[..., Fleet]) -> None:
    servers = fleet(slow=("a", "b"))

    async def sample(seed: int) -> tuple[list[Generation], dict[str, float]]:
        async with servers.client.session(replace(SAMPLING, seed=seed), policy_version=4) as session:
            return await session.generate(REQUESTS), session.metrics()

    batches = [in_background(partial(servers.client.run, sample(1)), name="batch")]
    servers.wait_until(("a", "asked", 4), ("b", "asked", 4))
    batches.append(in_background(partial(servers.client.run, sample(2)), name="batch"))
    (_, first), (_, second) = (batch.result(20) for batch in batches)
    assert servers.of("a") == servers.of("b") == [("given", 4), ("asked", 4), ("asked", 4)]
    assert [server.most_active for server in servers.servers.values()] == [3, 3]
    orders = [[body["sampling_params"][0]["sampling_seed"] for body in server.bodies] for server in servers.servers.values()]
    assert len(set(orders[0] + orders[1])) == 4
    assert first["time/queued"] < SLOW_S / 2 < second["time/queued"], "each tells of its own first request"
    assert first["servers/used"] == second["servers/used"] == 2


def test_what_giving_weights_raises_ends_the_call(fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch) -> None:
    servers = fleet()

    def differ(endpoint: str, version: int) -> None:
        raise RuntimeError("weights of policy version 4 are wanted; kept are those of [8]")

    servers.client._rolling._give = differ  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"kept are those of \[8\]"):
        servers.sample(4).result(10)


def test_dead_servers_are_waited_for_until_the_deadline(fleet: Callable[..., Fleet]) -> None:
    servers = fleet()
    for server in servers.servers.values():
        server.version = None
    with pytest.raises(RolloutFailed, match=r"^no server answered within 0.6 s: http://\S*: HTTP 503; http://\S*: HTTP 503$"):
        servers.sample(4).result(20)
    threading.Timer(0.2, lambda: setattr(servers.servers["b"], "version", "-1")).start()
    assert_whole(servers.sample(4), 4)
    assert servers.of("a") == []
