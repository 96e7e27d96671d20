"""Retries, failures and bookkeeping of the generation client, against a small HTTP server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rollout.client import GenerationClient, RolloutFailed, WeightsMissing, response_seed
from rollout.records import Generation, GenerationRequest, Sinks
from rollout.sglang.generate import keep_routes, keep_top_tokens, read_answer, read_generation, split_answers
from tests.rollout.generate_stub import REQUESTS, SAMPLING, Answer, Stub, all_good, answers_of, good_answer


def make_client(*stubs: Stub, **changes: Any) -> GenerationClient:
    options = {"request_timeout_s": 5, "max_retries": 2, "max_in_flight": 100, "backoff_s": 0.01, **changes}
    return GenerationClient([one.endpoint for one in stubs], **options)


def test_body_says_every_sampling_setting_and_a_seed_per_sample(stub: Callable[[Answer], Stub]) -> None:
    server = stub(all_good)
    rows = make_client(server, api_key="secret").generate(REQUESTS[:2], SAMPLING, num_samples=2)
    [body] = server.bodies
    assert body["input_ids"] == [[0, 1], [0, 1], [1, 2], [1, 2]]
    assert body["return_logprob"] is True
    seeds = [params.pop("sampling_seed") for params in body["sampling_params"]]
    assert seeds == [response_seed(3, "r0", 0), response_seed(3, "r0", 1), response_seed(3, "r1", 0), response_seed(3, "r1", 1)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    neutral = {"min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    said = {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop_token_ids": [5, 6], **neutral}
    assert body["sampling_params"] == [said] * 4
    assert len(set(body["rid"])) == 4
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert rows[1][0].response_token_ids == (1, 7) and rows[1][0].engine_logprobs.tolist() == [-0.5, -0.25]
    assert [(span.policy_version, span.start, span.end) for span in rows[1][0].version_spans] == [(4, 0, 1), (5, 1, 2)]


def test_requests_are_dealt_to_all_servers_and_groups_stay_together(stub: Callable[[Answer], Stub]) -> None:
    servers = [stub(all_good), stub(all_good)]
    rows = make_client(*servers).generate(REQUESTS, SAMPLING, num_samples=3)
    assert [len(row) for row in rows] == [3] * 6
    assert [len(server.bodies) for server in servers] == [1, 1]
    assert servers[0].asked == [f"r{i}#{j}" for i in (0, 2, 4) for j in range(3)]


def test_by_outstanding_tokens_a_long_answer_counts_for_many_short_ones(stub: Callable[[Answer], Stub]) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.2)
        return all_good(body)

    servers = [stub(slow), stub(slow)]
    client = make_client(*servers, samples_per_call=2, assignment="least_outstanding")
    requests = [replace(request, max_new_tokens=10 if index else 100) for index, request in enumerate(REQUESTS)]
    rows = client.generate(requests, SAMPLING, num_samples=2)
    assert [[generation.request_id for generation in row] for row in rows] == [[f"r{i}"] * 2 for i in range(6)]
    assert servers[0].asked == ["r0#0", "r0#1"]
    assert sorted(servers[1].asked) == [f"r{i}#{j}" for i in range(1, 6) for j in range(2)]


def test_by_outstanding_tokens_a_fast_server_gets_more(stub: Callable[[Answer], Stub]) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.3)
        return all_good(body)

    servers = [stub(slow), stub(all_good)]
    client = make_client(*servers, samples_per_call=1, max_in_flight=2, assignment="least_outstanding")
    assert [len(row) for row in client.generate(REQUESTS, SAMPLING, num_samples=1)] == [1] * 6
    assert len(servers[0].bodies) < len(servers[1].bodies)
    with pytest.raises(ValueError, match="expected 'fixed' with samples_per_call None"):
        make_client(*servers, assignment="least_outstanding")


def test_turns_stay_on_one_server_and_have_own_seeds_and_limits(stub: Callable[[Answer], Stub]) -> None:
    servers = [stub(all_good), stub(all_good)]
    later = [replace(request, turn=2, max_new_tokens=1) for request in REQUESTS[::-1]]

    async def talk() -> list[Generation]:
        async with make_client(*servers).session(SAMPLING, policy_version=None) as session:
            await session.generate(REQUESTS)
            return await session.generate(later)

    generations = asyncio.run(talk())
    assert [generation.request_id for generation in generations] == [f"r{i}" for i in (5, 4, 3, 2, 1, 0)]
    assert servers[0].asked == ["r0#0", "r2#0", "r4#0", "r4#0.2", "r2#0.2", "r0#0.2"]
    limits = [[params["max_new_tokens"] for params in body["sampling_params"]] for body in servers[0].bodies]
    assert limits == [[4] * 3, [1] * 3]
    seeds = {params["sampling_seed"] for server in servers for body in server.bodies for params in body["sampling_params"]}
    assert len(seeds) == 12


def test_a_session_that_broke_off_gives_its_responses_again(stub: Callable[[Answer], Stub]) -> None:
    server = holding(stub, 4)
    client = make_client(server)

    async def talk(*, breaks: bool) -> list[Generation]:
        async with client.session(SAMPLING, policy_version=4) as session:
            first = await session.generate(REQUESTS)
            if breaks:
                server.version = "0"  # restarted with other weights
                session.gate.close(server.endpoint)
            return [*first, *await session.generate([replace(request, turn=1) for request in REQUESTS])]

    with pytest.raises(WeightsMissing):
        asyncio.run(talk(breaks=True))
    server.version = "4"  # published
    assert len(asyncio.run(talk(breaks=False))) == 12
    assert server.asked == [f"r{i}#0" for i in range(6)] + [f"r{i}#0.1" for i in range(6)], "nothing is sampled twice"


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.gate.LOOK_TIMEOUT_S", 1.0)
    monkeypatch.setattr("rollout.gate.SILENT_LOOK_TIMEOUT_S", 0.1)


def test_a_server_whose_computing_process_is_silent_is_asked_nothing(
    stub: Callable[[Answer], Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_s = 6.0
    monkeypatch.setattr("rollout.gate.LOOK_TIMEOUT_S", look_s)
    monkeypatch.setattr("rollout.gate.SILENT_LOOK_TIMEOUT_S", 1.0)
    hung, good = stub(answers_of(4)), stub(answers_of(4))
    hung.version = good.version = "4"
    hung.computes.clear()
    client = make_client(hung, good)

    def generate() -> tuple[float, dict[str, float]]:
        began = time.monotonic()
        assert [len(row) for row in client.generate(REQUESTS, SAMPLING, num_samples=2, policy_version=4)] == [2] * 6
        return time.monotonic() - began, client.last_report

    first, second = generate(), generate()
    assert first[0] > look_s > second[0], "the next batch does not wait for it as long"
    for _, report in (first, second):
        assert report.items() >= {"servers/used": 1.0, "servers/silent": 1.0, "servers/retries": 0.0}.items()
    assert not hung.bodies
    hung.computes.set()
    assert generate()[1].items() >= {"servers/used": 2.0, "servers/silent": 0.0}.items()


def test_a_hang_is_waited_for_longer_than_silence(stub: Callable[[Answer], Stub], quick_looks: None) -> None:
    hung = stub(answers_of(4))
    hung.version = "-1"
    hung.computes.clear()
    reason = rf"^no server answered within 0.5 s: {hung.endpoint}: its computing process gave no answer within 1 s"
    with pytest.raises(RolloutFailed, match=reason):
        make_client(hung, wait_s=0.2, hang_s=0.3).generate(REQUESTS, SAMPLING, num_samples=1, policy_version=4)
    threading.Timer(1.5, hung.computes.set).start()  # it has been started again
    with pytest.raises(WeightsMissing, match=r"has '-1'"):
        make_client(hung, wait_s=0.2, hang_s=60).generate(REQUESTS, SAMPLING, num_samples=1, policy_version=4)


def test_aborted_samples_alone_are_sampled_again(stub: Callable[[Answer], Stub]) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        abort = {"type": "abort", "message": "paused"}
        first = len(server.bodies) == 1
        return 200, [
            good_answer(prompt, **({"finish_reason": abort} if first and prompt[0] in (1, 4) else {})) for prompt in body["input_ids"]
        ]

    server = stub(answer)
    rows = make_client(server).generate(REQUESTS, SAMPLING, num_samples=1)
    assert server.asked == ["r0#0", "r1#0", "r2#0", "r3#0", "r4#0", "r5#0", "r1#0", "r4#0"]
    assert [row[0].num_retries for row in rows] == [0, 1, 0, 0, 1, 0]
    first, again = server.bodies
    assert again["sampling_params"][0] == first["sampling_params"][1], "the same seed: a retry must not change the sample"
    assert not set(first["rid"]) & set(again["rid"])


@pytest.mark.parametrize("failure", ["status 503", "not JSON", "connection refused", "no answer in time"])
def test_failed_call_goes_to_another_server(stub: Callable[[Answer], Stub], failure: str) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(2.0)
        return all_good(body)

    answers: dict[str, Answer] = {
        "status 503": lambda _: (503, {"error": "busy"}),
        "not JSON": lambda _: (200, b"<html>"),
        "no answer in time": slow,
    }
    bad, good = stub(answers.get(failure, all_good)), stub(all_good)
    if failure == "connection refused":
        bad.server.shutdown()
        bad.server.server_close()
    seen = []
    # A busy machine may take a second for a connection that nothing is wrong with.
    timeout_s = 1.0 if failure == "no answer in time" else 30.0
    rows = make_client(bad, good, request_timeout_s=timeout_s).generate(
        REQUESTS, SAMPLING, num_samples=2, on_generation=lambda *arrived: seen.append(arrived)
    )
    assert [[generation.request_id for generation in row] for row in rows] == [[request.request_id] * 2 for request in REQUESTS]
    assert len(seen) == 12
    assert {generation.num_retries for row in rows for generation in row} == {0, 1}


def test_giving_up_names_endpoint_request_reason_and_attempts(stub: Callable[[Answer], Stub]) -> None:
    server = stub(lambda _: (500, {"error": "out of memory"}))
    with pytest.raises(RolloutFailed, match=rf"^{server.endpoint}: request r0#0: HTTP 500: .*out of memory.* \(gave up after 3 attempts\)"):
        make_client(server).generate(REQUESTS[:1], SAMPLING, num_samples=1)
    assert len(server.bodies) == 3


def test_bad_request_is_not_repeated(stub: Callable[[Answer], Stub]) -> None:
    server = stub(lambda _: (400, {"error": {"message": "prompt too long"}}))
    with pytest.raises(RolloutFailed, match=r"request r0#0 and 1 more: HTTP 400: .*prompt too long"):
        make_client(server).generate(REQUESTS[:1], SAMPLING, num_samples=2)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"output_token_logprobs": None}, "output_token_logprobs is missing"),
        ({"output_token_logprobs": [[-0.5, 0, None]]}, "1 log-probs for 2 response tokens"),
        ({"output_token_logprobs": [[None, 0, None], [-1.0, 7, None]]}, "log-prob 0 is None"),
        ({"output_token_logprobs": [[-0.5, 0, None], [float("nan"), 7, None]]}, "log-prob 1 is nan"),
        ({"output_token_logprobs": [[-0.5, 0, None], [-1.0, 8, None]]}, "log-prob 1 belongs to token 8, but the response has 7"),
        ({"weight_versions": None}, "weight_versions is missing"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 2}]}, "'default' is not a policy version"),
        ({"weight_versions": [{"version": "1", "start": 0, "end": 1}]}, "do not cover 2 response tokens"),
        ({"finish_reason": {"type": "abort", "status_code": 400, "message": "too long"}}, "refused by the server: too long"),
        ({"finish_reason": {"type": "tired"}}, "expected stop, length or abort"),
    ],
)
def test_answer_with_something_missing_is_an_error_and_never_filled_in(
    stub: Callable[[Answer], Stub], meta: dict[str, Any], reason: str
) -> None:
    server = stub(lambda body: (200, [good_answer(prompt, **meta) for prompt in body["input_ids"]]))
    with pytest.raises(RolloutFailed, match=f"{server.endpoint}: request r0#0: .*{reason}"):
        make_client(server).generate(REQUESTS[:1], SAMPLING, num_samples=1)
    assert len(server.bodies) == 1


def test_logprobs_and_token_ids_keep_every_bit() -> None:
    drawn = random.Random(5)
    narrow = [struct.unpack("f", struct.pack("f", -drawn.expovariate(1)))[0] for _ in range(2000)]  # as SGLang has them
    wide = [-drawn.expovariate(1) * 10 ** drawn.uniform(-300, 300) for _ in range(2000)]
    logprobs = [*narrow, *wide, -0.0, 0, -5e-324, -sys.float_info.max]
    token_ids = [drawn.randrange(1 << drawn.randrange(1, 24)) for _ in logprobs]
    spans = [{"version": "4", "start": 0, "end": len(logprobs)}]
    entries = [[logprob, token_id, "text"] for logprob, token_id in zip(logprobs, token_ids, strict=True)]
    answer = good_answer([1], output_token_logprobs=entries, weight_versions=spans) | {"output_ids": token_ids}
    [piece] = split_answers(json.dumps([answer]).encode())
    generation = read_generation(read_answer(piece), REQUESTS[0], num_retries=0, latency_s=0.0)
    assert struct.pack(f"{len(logprobs)}d", *generation.engine_logprobs) == struct.pack(f"{len(logprobs)}d", *logprobs)
    assert generation.response_token_ids == tuple(token_ids)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": "busy"}, "no list of answers for 1 prompts: Expected `array`, got `object`"),
        ([{"output_ids": [1]}], "missing required field `meta_info`"),
        ([{"meta_info": {"finish_reason": "stop"}}], "missing required field `output_ids`"),
        ([good_answer([1]) | {"output_ids": [1, 7.5]}], r"Expected `int`, got `float` - at `\$.output_ids\[1\]`"),
        ([good_answer([1]) | {"output_ids": [-1, 7]}], "a token id is -1 or 7, expected 0 to 16777215"),
        ([good_answer([1]) | {"output_ids": []}], "the response is empty"),
    ],
)
def test_an_answer_of_another_shape_is_an_error_that_names_the_request(stub: Callable[[Answer], Stub], body: Any, reason: str) -> None:
    server = stub(lambda _: (200, body))
    with pytest.raises(RolloutFailed, match=f"^{server.endpoint}: request r0#0: .*{reason}"):
        make_client(server).generate(REQUESTS[:1], SAMPLING, num_samples=1)


def test_too_few_answers_are_an_error(stub: Callable[[Answer], Stub]) -> None:
    server = stub(lambda body: (200, [good_answer(body["input_ids"][0])]))
    with pytest.raises(RolloutFailed, match="1 answers for 3 prompts"):
        make_client(server).generate(REQUESTS[:1], SAMPLING, num_samples=3)


def test_no_more_samples_under_way_than_allowed(stub: Callable[[Answer], Stub]) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.02)
        return all_good(body)

    server = stub(answer)
    rows = make_client(server, max_in_flight=5, samples_per_call=2).generate(REQUESTS, SAMPLING, num_samples=4)
    assert [len(row) for row in rows] == [4] * 6
    assert len(server.bodies) == 12
    assert 2 < server.most_active <= 5


def test_two_requests_with_one_name_are_refused(stub: Callable[[Answer], Stub]) -> None:
    with pytest.raises(ValueError, match="two requests have the name r0#0"):
        make_client(stub(all_good)).generate([REQUESTS[0], REQUESTS[0]], SAMPLING, num_samples=1)


def test_no_requests_give_no_responses(stub: Callable[[Answer], Stub]) -> None:
    assert make_client(stub(all_good)).generate([], SAMPLING, num_samples=1) == []


def test_what_on_generation_raises_comes_out_as_it_is(stub: Callable[[Answer], Stub]) -> None:
    def stop(*_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_client(stub(all_good)).generate(REQUESTS, SAMPLING, num_samples=1, on_generation=stop)


def test_a_stream_draws_requests_with_room_and_gives_each_response_once(stub: Callable[[Answer], Stub]) -> None:
    failed: set[str] = set()

    def first_attempt_fails(body: dict[str, Any]) -> tuple[int, Any]:
        (name,) = body["rid"]
        request = name.rsplit("-", 1)[0]
        time.sleep(0.002)
        if request not in failed:
            failed.add(request)
            return 503, {}
        return all_good(body)

    servers = [stub(first_attempt_fails), stub(first_attempt_fails)]
    arrived: list[str] = []

    def requests() -> Iterator[GenerationRequest]:
        for number in range(50):
            assert number - len(arrived) <= 3  # what is drawn and not yet handed over is under way
            yield GenerationRequest(request_id=f"r{number}", prompt_token_ids=(number, 1))

    client = make_client(*servers, max_in_flight=4)
    client.stream(requests(), SAMPLING, on_generation=lambda request, generation: arrived.append(generation.request_id))
    assert sorted(arrived) == sorted(f"r{number}" for number in range(50))
    assert max(server.most_active for server in servers) <= 4
    assert sum(len(server.bodies) for server in servers) == 100


def test_a_stream_keeps_what_arrived_and_seeds_as_generate_does(stub: Callable[[Answer], Stub]) -> None:
    server = stub(lambda body: all_good(body) if body["input_ids"] != [[3, 4]] else (400, {"error": "too long"}))
    arrived: list[str] = []
    with pytest.raises(RolloutFailed, match=r"request r3#0: HTTP 400.*too long"):
        make_client(server, max_in_flight=1).stream(
            REQUESTS, SAMPLING, on_generation=lambda request, generation: arrived.append(generation.request_id)
        )
    assert arrived == ["r0", "r1", "r2"]
    streamed = [body["sampling_params"][0]["sampling_seed"] for body in server.bodies[:3]]
    assert streamed == [response_seed(SAMPLING.seed or 0, f"r{number}", 0) for number in range(3)]


# --------------------------------------------------------------------------------------------- servers with other weights, or none


def holding(stub: Callable[[Answer], Stub], version: int) -> Stub:
    server = stub(answers_of(version))
    server.version = str(version)
    return server


def test_only_servers_that_hold_the_wanted_weights_are_asked(stub: Callable[[Answer], Stub]) -> None:
    old, good, silent, other_good = holding(stub, 3), holding(stub, 4), stub(all_good), holding(stub, 4)
    client = make_client(old, good, silent, other_good)
    rows = client.generate(REQUESTS, SAMPLING, num_samples=2, policy_version=4)
    assert {g.policy_versions for row in rows for g in row} == {(4, 4)} and [len(row) for row in rows] == [2] * 6
    assert (len(old.bodies), len(silent.bodies)) == (0, 0)
    assert sorted(good.asked + other_good.asked) == sorted(f"r{i}#{j}" for i in range(6) for j in range(2))
    # Dealt to four servers, as if all held the weights: a call's samples, and so the batches, do not depend on who is there.
    assert sorted(len(body["rid"]) for server in (good, other_good) for body in server.bodies) == [2, 2, 4, 4]
    assert client.last_report.items() >= {"servers/used": 2.0, "servers/retries": 0.0}.items()


def test_the_tail_runs_from_the_first_server_that_ends_to_the_last(stub: Callable[[Answer], Stub]) -> None:
    def late(body: dict[str, Any]) -> tuple[int, object]:
        time.sleep(0.3)
        return all_good(body)

    client = make_client(stub(all_good), stub(late))
    client.generate(REQUESTS, SAMPLING, num_samples=1)
    assert 0.2 < client.last_report["time/tail"] < 30
    client.generate(REQUESTS[:1], SAMPLING, num_samples=1)  # one server alone has none
    assert client.last_report["time/tail"] == 0.0


def test_without_a_server_with_the_weights_nobody_is_asked(stub: Callable[[Answer], Stub]) -> None:
    servers = [holding(stub, 3), stub(all_good)]
    with pytest.raises(WeightsMissing, match=rf"^no server holds policy version 4: {servers[0].endpoint} has '3'$"):
        make_client(*servers).generate(REQUESTS, SAMPLING, num_samples=1, policy_version=4)
    assert not servers[0].bodies + servers[1].bodies


def test_a_server_is_waited_for_until_the_deadline(
    stub: Callable[[Answer], Stub],
) -> None:
    server = stub(answers_of(4))
    with pytest.raises(RolloutFailed, match=rf"^no server answered within 0.2 s: {server.endpoint}: "):
        make_client(server, wait_s=0.2).generate(REQUESTS, SAMPLING, num_samples=1, policy_version=4)
    threading.Timer(0.3, lambda: setattr(server, "version", "4")).start()
    assert len(make_client(server, wait_s=30).generate(REQUESTS, SAMPLING, num_samples=1, policy_version=4)) == 6


def test_an_answer_of_unannounced_weights_is_sampled_again_elsewhere(stub: Callable[[Answer], Stub]) -> None:
    def swapped(body: dict[str, Any]) -> tuple[int, Any]:
        changing.version = "0"  # as if it had been restarted after it was looked at
        return answers_of(0)(body)

    changing, good = stub(swapped), holding(stub, 4)
    changing.version = "4"
    client = make_client(changing, good)
    rows = client.generate(REQUESTS, SAMPLING, num_samples=3, policy_version=4)
    assert {g.policy_versions for row in rows for g in row} == {(4, 4)} and [len(row) for row in rows] == [3] * 6
    assert len(changing.bodies) == 1 and client.last_report.items() >= {"servers/used": 1.0, "servers/retries": 9.0}.items()


def test_a_server_gets_one_whole_share_at_a_time(stub: Callable[[Answer], Stub]) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.1)
        return answers_of(4)(body)

    good, dead = stub(slow), stub(lambda _: (500, {}))
    good.version = dead.version = "4"
    make_client(good, dead).generate(REQUESTS, SAMPLING, num_samples=2, policy_version=4)
    assert (len(good.bodies), good.most_active) == (2, 6)
    assert good.asked[6:] == dead.asked[:6] == [f"r{i}#{j}" for i in (1, 3, 5) for j in range(2)]


def test_retries_are_counted_on_when_the_same_call_is_made_again(stub: Callable[[Answer], Stub]) -> None:
    def fatal(body: dict[str, Any]) -> tuple[int, Any]:
        server.version = "-1"  # the request that kills its server, which is then restarted
        return 500, {"error": "crashed"}

    server = stub(fatal)
    client = make_client(server, max_retries=2)
    for _ in range(2):
        server.version = "4"  # published
        with pytest.raises(WeightsMissing):
            client.generate(REQUESTS[:1], SAMPLING, num_samples=1, policy_version=4)
    server.version = "4"
    with pytest.raises(RolloutFailed, match=r"request r0#0: HTTP 500: .*crashed.* \(gave up after 3 attempts\)"):
        client.generate(REQUESTS[:1], SAMPLING, num_samples=1, policy_version=4)


def test_wrong_key_is_an_error_at_once_and_no_reason_to_wait(stub: Callable[[Answer], Stub]) -> None:
    server = stub(all_good)
    server.unauthorized = True
    with pytest.raises(RolloutFailed, match=rf"^{server.endpoint}/model_info: HTTP 401"):
        make_client(server).generate(REQUESTS, SAMPLING, num_samples=1, policy_version=4)


# ------------------------------------------------------------------------------------------------------------------- experts


class Kept:
    """A RouteSink that remembers."""

    def __init__(self) -> None:
        self.ids: list[bytes] = []
        self.threads: set[int] = set()

    def keep(self, ids: bytes, *, num_inputs: int) -> int:
        if len(ids) != 4 * num_inputs:
            raise ValueError(f"{len(ids)} bytes for {num_inputs} tokens")
        self.ids.append(ids)
        self.threads.add(threading.get_ident())
        return len(self.ids) - 1


WHOLE = {"weight_versions": [{"version": "4", "start": 0, "end": 2}], "num_retractions": 0}


def routed(text: str | None = None, **meta: Any) -> Answer:
    """One expert a token, in one layer: the prompt's tokens and the first response token visit expert 0, 1, 2."""
    ids = b"".join(number.to_bytes(4, "little") for number in range(3))
    experts = {"routed_experts": base64.b64encode(ids).decode() if text is None else text}
    return lambda body: (200, [good_answer(prompt, **{**WHOLE, **experts, **meta}) for prompt in body["input_ids"]])


def ask_with(sink: Kept | None, server: Stub) -> list[Generation]:
    client = make_client(server)

    async def ask() -> list[Generation]:
        async with client.session(SAMPLING, policy_version=None, sinks=Sinks(routes=sink)) as session:
            return await session.generate(REQUESTS[:3])

    return client.run(ask())


def test_experts_are_asked_for_and_read_outside_the_event_loop(stub: Callable[[Answer], Stub]) -> None:
    server, sink = stub(routed()), Kept()
    assert sorted(answer.routes for answer in ask_with(sink, server) if answer.routes is not None) == [0, 1, 2]
    assert sink.ids == [bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])] * 3 and threading.get_ident() not in sink.threads
    assert [answer.routes for answer in ask_with(None, server)] == [None] * 3
    assert [body.get("return_routed_experts") for body in server.bodies] == [True, None]


def test_experts_leave_the_answer_when_they_are_read(stub: Callable[[Answer], Stub]) -> None:
    answer = read_answer(routed()({"input_ids": [[0, 1]]})[1][0])
    generation = read_generation(answer, REQUESTS[0], num_retries=0, latency_s=0.0)
    assert keep_routes(answer, generation, Kept()).routes == 0
    assert answer.meta_info.routed_experts is None


@pytest.mark.parametrize(
    "meta", [{"num_retractions": 1}, {"weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}]}]
)
def test_experts_of_what_was_computed_twice_are_not_known(stub: Callable[[Answer], Stub], meta: dict[str, Any]) -> None:
    sink = Kept()
    assert [answer.routes for answer in ask_with(sink, stub(routed(**meta)))] == [None] * 3 and sink.ids == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (routed(routed_experts=None), "routed_experts is missing; expected a server of a model with experts, started with --enable"),
        (routed(num_retractions=None), "num_retractions is None, expected a number"),
        (routed("AAAA"), "3 bytes for 3 tokens"),
        (routed("no base64!"), "base64|Only"),
    ],
)
def test_an_answer_without_its_experts_is_an_error_that_names_the_server(
    stub: Callable[[Answer], Stub], answer: Answer, reason: str
) -> None:
    server = stub(answer)
    with pytest.raises(RolloutFailed, match=rf"^{server.endpoint}: request r0#0: .*({reason})"):
        ask_with(Kept(), server)


# ----------------------------------------------------------------------------------------------------------------- top tokens


class KeptTop:
    """A TopTokenSink that remembers."""

    top_k = 2

    def __init__(self) -> None:
        self.rows: list[tuple[list[Any], list[Any]]] = []

    def keep(self, ids: Any, logprobs: Any) -> int:
        if ids.max() >= 100:
            raise ValueError("an id of no token")
        self.rows.append((ids.tolist(), logprobs.tolist()))
        return len(self.rows) - 1


def topped(
    ids: list[int] | None = None, logprobs: list[float] | None = None, *, shape: list[int] | None = None, **meta: Any
) -> Callable[[list[int]], dict[str, Any]]:
    """Of the response (first prompt token, 7) with log-probs -0.5 and -0.25: it is the likeliest token, then the second one."""

    def answer(prompt: list[int]) -> dict[str, Any]:
        given = np.array([prompt[0], 9, 9, 7] if ids is None else ids, "<i4"), np.array(logprobs or [-0.5, -1.0, -0.125, -0.25], "<f4")
        texts = [base64.b64encode(x.tobytes()).decode() for x in given]
        fields = {
            "output_top_logprobs_idx_flat_b64": texts[0],
            "output_top_logprobs_val_flat_b64": texts[1],
            "output_top_logprobs_shape": [2, 2] if shape is None else shape,
        }
        return good_answer(prompt, **{**WHOLE, **fields, **meta})

    return answer


def ask_for_top(sink: KeptTop, server: Stub) -> list[Generation]:
    client = make_client(server)

    async def ask() -> list[Generation]:
        async with client.session(SAMPLING, policy_version=None, sinks=Sinks(top=sink)) as session:
            return await session.generate(REQUESTS[:3])

    return client.run(ask())


def test_the_likeliest_tokens_are_asked_for_and_kept_as_numbers(stub: Callable[[Answer], Stub]) -> None:
    server, sink = stub(lambda body: (200, [topped()(prompt) for prompt in body["input_ids"]])), KeptTop()
    generations = ask_for_top(sink, server)
    assert [sink.rows[generation.top] for generation in generations if generation.top is not None] == [
        ([[first, 9], [9, 7]], [[-0.5, -1.0], [-0.125, -0.25]]) for first in (0, 1, 2)
    ]
    [body] = server.bodies
    assert body["top_logprobs_num"] == 2 and body["return_flat_raw_output_top_logprobs"] and body["return_flat_raw_top_logprobs_b64"]
    assert ask_with(None, stub(routed())) and "return_routed_experts" not in body


def test_their_text_leaves_the_answer_when_it_is_read() -> None:
    answer = read_answer(topped()([3, 4]))
    generation = read_generation(answer, REQUESTS[3], num_retries=0, latency_s=0.0)
    assert keep_top_tokens(answer, generation, KeptTop()).top == 0
    assert answer.meta_info.output_top_logprobs_idx_flat_b64 is answer.meta_info.output_top_logprobs_val_flat_b64 is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (topped(output_top_logprobs_val_flat_b64=None), "output_top_logprobs are missing; expected a server that knows return_flat_raw"),
        (topped(shape=[1, 2]), r"output_top_logprobs have the shape \[1, 2\] in 16 and 16 bytes, expected \[2, 2\]"),
        (topped([0, 9]), r"the shape \[2, 2\] in 8 and 16 bytes, expected \[2, 2\]"),
        (topped(output_top_logprobs_idx_flat_b64="no base64!"), "base64|Only"),
        # Log-probs of another temperature, say.
        (
            topped(logprobs=[-0.5, -1.0, -0.125, -0.75]),
            "top log-prob of the sampled token 1 is 0.5 away from its log-prob, expected the same",
        ),
        (topped(logprobs=[math.nan, -1.0, -0.125, -0.25]), "top log-prob of the sampled token 0 is nan away"),
        (topped([0, 100, 9, 7]), "an id of no token"),
    ],
)
def test_likeliest_tokens_that_cannot_be_the_answers_are_an_error(
    stub: Callable[[Answer], Stub], answer: Callable[[list[int]], dict[str, Any]], reason: str
) -> None:
    server = stub(lambda body: (200, [answer(prompt) for prompt in body["input_ids"]]))
    with pytest.raises(RolloutFailed, match=rf"^{server.endpoint}: request r0#0: .*({reason})"):
        ask_for_top(KeptTop(), server)
