"""Two real servers, of which one is killed, stopped or restarted: who is asked, with which weights, and that no response is lost."""

from __future__ import annotations

import dataclasses
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from rollout.background import in_background
from rollout.client import GenerationClient, RolloutFailed, WeightsMissing
from rollout.records import Generation, GenerationRequest, SamplingParams
from rollout.sglang.control import weight_version
from rollout.sglang.server import ServerDied, ServerPool, ServerSettings
from rollout.supervisor import Supervisor
from rollout.weights.checksums import check_equal, expected_checksums
from rollout.weights.collective import CollectiveWeightSync
from rollout.weights.disk import DiskWeightSync
from rollout.weights.keeper import CollectiveKeeper, DiskKeeper, WeightKeeper
from rollout.weights.time_limits import WeightTimeLimits
from rollout.weights.weight_sync import WeightSync, WeightSyncFailed
from tests.rollout import model_reference as reference

pytestmark = pytest.mark.servers

REQUESTS = [GenerationRequest(request_id=f"prompt{i}", prompt_token_ids=tuple(range(3 + i, 9 + 2 * i))) for i in range(6)]
LONG = SamplingParams(max_new_tokens=120, temperature=1.0, top_p=1.0, top_k=-1, stop_token_ids=(), seed=7)
SHORT = dataclasses.replace(LONG, max_new_tokens=8)


class Two:
    """Two servers and everything that a trainer has on its side."""

    def __init__(self, pool: ServerPool, tensors: list[tuple[str, Tensor]]) -> None:
        self.pool = pool
        self.tensors = tensors
        self.said: list[str] = []
        self.supervisor = self.watch(max_restarts=5)
        self.sync: WeightSync = CollectiveWeightSync(pool.endpoints, bucket_bytes=20_000)

    def watch(self, **changes: float) -> Supervisor:
        options = {"max_restarts": 0, "window_s": 3600, "unresponsive_after_s": 6, "progress_timeout_s": 60, "start_timeout_s": 900}
        return Supervisor(self.pool, announce=self.said.append, **options | changes)  # type: ignore[arg-type]

    def client(self, **changes: object) -> GenerationClient:
        options = {"request_timeout_s": 400, "max_retries": 3, "max_in_flight": 1000, "wait_s": 100, **changes}
        return GenerationClient(self.pool.endpoints, **options)  # type: ignore[arg-type]

    def publish(self, version: int) -> tuple[str, ...]:
        return self.sync.publish(version, iter(self.tensors))

    def version(self, index: int) -> str:
        return weight_version(self.pool.endpoints[index], key=None, timeout_s=10)

    def stop_computing(self, index: int) -> None:
        """The process that computes stands still; its HTTP process goes on."""
        [scheduler] = [process for process in self.pool.processes[index].tree() if process.name().startswith("sglang::schedul")]
        scheduler.suspend()

    def kill(self, index: int) -> None:
        self.pool.processes[index].popen.send_signal(signal.SIGKILL)
        self.pool.processes[index].wait(10)

    def supervise(self, until: Callable[[], bool], timeout_s: float = 200) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            self.supervisor.check()
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def whole(self) -> None:
        """Both servers run."""
        self.supervise(lambda: not self.supervisor._starting and all(server.is_running for server in self.pool.processes))


@pytest.fixture(scope="module")
def pool(server_settings: ServerSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    settings = dataclasses.replace(server_settings, options={"log_requests": True, "log_requests_level": 0})
    with ServerPool.start(settings, num_servers=2, log_dir=tmp_path_factory.mktemp("two"), start_timeout_s=900) as pool:
        yield pool


@pytest.fixture(scope="module")
def two(pool: ServerPool, base_model: Qwen3MoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    two = Two(pool, list(reference.checkpoint_tensors(base_model, tmp_path_factory.mktemp("base"))))
    yield two
    two.supervisor.close()
    two.sync.close()


@pytest.fixture(autouse=True)
def both_run(two: Two) -> Iterator[None]:
    """Every test begins with two servers that hold version 1."""
    two.whole()
    two.publish(1)
    two.said.clear()
    yield


def writer(model_folder: Path) -> Callable[[Path, Iterator[tuple[str, Tensor]]], None]:
    """For weight sync through a folder: writes a checkpoint of the served model."""

    def write_checkpoint(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(tensors), folder / "model.safetensors")
        (folder / "config.json").write_text((model_folder / "config.json").read_text())

    return write_checkpoint


def content(rows: list[list[Generation]]) -> list[list[tuple[object, ...]]]:
    return [[(g.request_id, g.response_token_ids, g.engine_logprobs, g.policy_versions) for g in row] for row in rows]


def in_mid_generation(monkeypatch: pytest.MonkeyPatch, endpoint: str, act: Callable[[], object]) -> None:
    """`act` shortly after `endpoint` gets its next call for responses; these take several times as long, on the fastest machine too."""
    send, acted = httpx.AsyncClient.post, threading.Event()

    async def post(http: httpx.AsyncClient, url: str, **options: Any) -> httpx.Response:
        if url == f"{endpoint}/generate" and not acted.is_set():
            acted.set()
            threading.Timer(0.05, act).start()
        return await send(http, url, **options)

    monkeypatch.setattr(httpx.AsyncClient, "post", post)


def asked(pool: ServerPool, index: int) -> int:
    """Responses of the client's that a server's log tells of, whichever process wrote it."""
    return sum("rid=" in line and "prompt" in line for line in (pool.processes[index].log_path).read_text().splitlines())


def test_a_killed_server_costs_no_response_and_waits_for_the_next_publish(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = two.client().generate(REQUESTS, LONG, num_samples=8, policy_version=1)
    assert [len(row) for row in undisturbed] == [8] * 6
    client = two.client()
    in_mid_generation(monkeypatch, two.pool.endpoints[0], lambda: two.kill(0))
    rows = client.generate(REQUESTS, LONG, num_samples=8, policy_version=1)
    assert content(rows) == content(undisturbed), "to the last bit: the same batches, on another server"
    assert client.last_report.items() >= {"servers/used": 1.0, "servers/retries": 24.0}.items()
    assert sorted({g.num_retries for row in rows for g in row}) == [0, 1]

    two.whole()
    assert two.said[0].startswith("SGLang server 0") and "was ended by SIGKILL; restarting it (1" in two.said[0]
    assert (two.version(0), two.version(1)) == ("-1", "1")
    before = asked(two.pool, 0)
    client = two.client()
    rows = client.generate(REQUESTS, SHORT, num_samples=4, policy_version=1)
    assert {g.policy_versions for row in rows for g in row} == {(1, 1)}
    assert asked(two.pool, 0) == before and client.last_report["servers/used"] == 1.0
    assert two.publish(2) == tuple(two.pool.endpoints)
    client.generate(REQUESTS, SHORT, num_samples=4, policy_version=2)
    assert asked(two.pool, 0) > before and client.last_report.items() >= {"servers/used": 2.0, "servers/retries": 0.0}.items()


@pytest.mark.parametrize(
    ("hangs", "said"), [("its HTTP process", "no answer to"), ("only what computes", "its computing process has answered nothing for 8 s")]
)
def test_the_requests_of_a_hanging_server_are_answered_by_the_other(
    two: Two, monkeypatch: pytest.MonkeyPatch, hangs: str, said: str
) -> None:
    monkeypatch.setattr(two.supervisor, "_most_stuck", 8)
    client, results = two.client(), []
    hung, stopped = two.pool.processes[1], threading.Event()
    old = hung.tree()

    def stop() -> None:
        if hangs == "its HTTP process":
            hung.popen.send_signal(signal.SIGSTOP)
        else:
            two.stop_computing(1)
        stopped.set()

    in_mid_generation(monkeypatch, two.pool.endpoints[1], stop)
    many = threading.Thread(target=lambda: results.extend(client.generate(REQUESTS, LONG, num_samples=8, policy_version=1)), daemon=True)
    many.start()
    assert stopped.wait(30)
    began = time.monotonic()
    two.supervise(lambda: bool(two.said))
    assert said in two.said[0] and "server 1" in two.said[0]
    assert time.monotonic() - began < 160, "long before the request's own time limit"
    many.join(240)
    assert [len(row) for row in results] == [8] * 6
    assert {g.policy_versions for row in results for g in row} == {(1, 1)}
    assert client.last_report["servers/retries"] == 24.0
    two.whole()
    assert two.pool.processes[1].pid != hung.pid and not any(process.is_running() for process in old)
    assert len(two.said) == 2, "nobody else was restarted"


def test_a_publish_goes_on_without_a_dead_server_and_takes_it_in_again(two: Two, model_folder: Path, tmp_path: Path) -> None:
    endpoints = two.pool.endpoints
    disk = DiskWeightSync(endpoints, write_checkpoint=writer(model_folder), directory=tmp_path)
    two.kill(0)
    for version, sync in ((2, two.sync), (3, disk)):
        assert sync.publish(version, iter(two.tensors)) == (endpoints[1],)
        assert two.version(1) == str(version)
    two.whole()
    for version, sync in ((4, disk), (5, two.sync)):
        assert sync.publish(version, iter(two.tensors)) == tuple(endpoints)
        assert (two.version(0), two.version(1)) == (str(version),) * 2
        check_equal(expected_checksums(iter(two.tensors), dtype=torch.float32), endpoints[0])


def test_a_keeper_gives_each_server_its_own_version(two: Two, model_folder: Path, tmp_path: Path) -> None:
    endpoints = two.pool.endpoints
    doubled = [(name, tensor * 2) for name, tensor in two.tensors]
    expected = {version: expected_checksums(iter(tensors), dtype=torch.float32) for version, tensors in ((2, two.tensors), (3, doubled))}
    keepers: list[WeightKeeper] = [
        CollectiveKeeper(endpoints, bucket_bytes=20_000),
        DiskKeeper(endpoints, write_checkpoint=writer(model_folder), directory=tmp_path),
    ]
    for keeper in keepers:
        keeper.offer(2, iter(two.tensors))
        keeper.offer(3, iter(doubled))
        keeper.give(endpoints[0], 3)
        assert (two.version(0), two.version(1)) == ("3", "1")
        both = [in_background(partial(keeper.give, endpoints[index], version), name="give") for index, version in enumerate((2, 3))]
        assert [given.result(60) for given in both] == [None, None]
        for index, version in enumerate((2, 3)):
            assert two.version(index) == str(version)
            check_equal(expected[version], endpoints[index])
        rows = two.client().generate(REQUESTS, SHORT, num_samples=1, policy_version=3)
        assert {g.policy_versions for row in rows for g in row} == {(3, 3)}
        keeper.close()
        two.publish(1)


def test_a_server_killed_during_a_broadcast_fails_the_publish(two: Two) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(two.tensors):
            if number == len(two.tensors) // 2:
                two.kill(1)
            yield item

    began = time.monotonic()
    with pytest.raises(WeightSyncFailed, match="policy version 2: no server took it"):
        two.sync.publish(2, tensors())
    assert time.monotonic() - began < 150, "the dead server is not waited for until the time limit"
    assert "unfinished update to 2" in two.version(0)
    with pytest.raises(WeightsMissing, match="unfinished update to 2"):
        two.client().generate(REQUESTS, SHORT, num_samples=1, policy_version=2)
    assert two.publish(2) == (two.pool.endpoints[0],)
    rows = two.client().generate(REQUESTS, SHORT, num_samples=1, policy_version=2)
    assert {g.policy_versions for row in rows for g in row} == {(2, 2)}


def test_a_server_that_hangs_in_a_broadcast_holds_up_nobody(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoints = two.pool.endpoints
    pids = [process.pid for process in two.pool.processes]
    sync = CollectiveWeightSync(endpoints, bucket_bytes=20_000, limits=WeightTimeLimits(control_s=5, step_s=6))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(two.tensors):
            if number == len(two.tensors) // 2:
                two.stop_computing(1)
            yield item

    began = time.monotonic()
    with pytest.raises(WeightSyncFailed, match=rf"policy version 2: no server took it: .*{endpoints[1]}"):
        sync.publish(2, tensors())
    assert time.monotonic() - began < 60
    assert "unfinished update to 2" in two.version(0)
    monkeypatch.setattr(two.supervisor, "_most_stuck", 8)
    two.supervise(lambda: bool(two.said))
    assert "its computing process has answered nothing for" in two.said[0] and "SGLang server 1" in two.said[0]
    assert two.supervisor._stuck[0] < 8, "a server that is paused, and has no group any more, answers"
    assert sync.publish(2, iter(two.tensors)) == (endpoints[0],), "in a new group"
    rows = two.client().generate(REQUESTS, SHORT, num_samples=1, policy_version=2)
    assert {g.policy_versions for row in rows for g in row} == {(2, 2)}
    two.whole()
    assert [process.pid == pid for process, pid in zip(two.pool.processes, pids, strict=True)] == [True, False]
    assert sync.publish(3, iter(two.tensors)) == tuple(endpoints) and sync.num_restarts == 1
    check_equal(expected_checksums(iter(two.tensors), dtype=torch.float32), endpoints[1])
    sync.close()


def test_what_had_arrived_when_the_weights_were_lost_is_not_sampled_again(two: Two) -> None:
    client = two.client(samples_per_call=1, max_in_flight=16)
    arrived: list[Generation] = []

    def keep(request: GenerationRequest, generation: Generation) -> None:
        arrived.append(generation)

    def lose(request: GenerationRequest, generation: Generation) -> None:
        arrived.append(generation)
        if len(arrived) == 10:
            two.publish(2)

    with pytest.raises(WeightsMissing):
        client.generate(REQUESTS, SHORT, num_samples=8, policy_version=1, on_generation=lose)
    two.publish(1)
    rows = client.generate(
        REQUESTS, SHORT, num_samples=8, policy_version=1, on_generation=lambda request, generation: arrived.append(generation)
    )
    assert [len(row) for row in rows] == [8] * 6 and len(arrived) == 48
    assert sorted(map(id, arrived)) == sorted(id(g) for row in rows for g in row)
    assert {g.policy_versions for g in arrived} == {(1, 1)}


def test_two_thousand_requests_in_flight_are_all_answered_in_little_memory(two: Two) -> None:
    client = two.client(max_in_flight=2000, request_timeout_s=400)
    params = dataclasses.replace(SHORT, max_new_tokens=2)
    wanted = (GenerationRequest(request_id=f"load{number}", prompt_token_ids=(3 + number % 30, 4)) for number in range(4000))
    arrived: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    client.stream(wanted, params, on_generation=lambda request, generation: arrived.append(generation.request_id))
    assert sorted(arrived) == sorted(f"load{number}" for number in range(4000))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 2000 * 150, f"{kilobytes / 2000:.0f} kB for each request in flight"


def test_no_server_is_one_error_and_too_many_restarts_are_another(two: Two) -> None:
    """The last test: both servers stay dead."""
    strict = two.watch(max_restarts=0, window_s=60)
    for index in (0, 1):
        two.kill(index)
    with pytest.raises(RolloutFailed, match=r"^no server answered within 1 s: http://127\S*: ConnectError.*; http://127"):
        two.client(wait_s=1).generate(REQUESTS, SHORT, num_samples=1, policy_version=1)
    with pytest.raises(WeightSyncFailed, match=r"^policy version 2: no server answers: http://127"):
        two.publish(2)
    with pytest.raises(ServerDied, match=r"^after 0 restarts within 60 s: SGLang server 1 .* was ended by SIGKILL; last lines of"):
        strict.check()
    assert "SGLang server 0" in two.said[-1] and two.said[-1].endswith("it is given up, 1 of 2 server(s) here are left")
    strict.close()
