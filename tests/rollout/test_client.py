"""Retries, failures and bookkeeping of the generation client, against a small HTTP server that misbehaves on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rollout.client import GenerationClient, RolloutFailed, sample_seed
from rollout.records import GenerationRequest, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=20, stop_token_ids=(5, 6), seed=3)
REQUESTS = [GenerationRequest(request_id=f"r{i}", prompt_token_ids=(i, i + 1)) for i in range(6)]

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def good_answer(prompt: list[int], **meta: Any) -> dict[str, Any]:
    token_ids = [prompt[0], 7]
    return {
        "output_ids": token_ids,
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 7},
            "output_token_logprobs": [[-0.5, token_ids[0], None], [-0.25, token_ids[1], None]],
            "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}],
            **meta,
        },
    }


def all_good(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, [good_answer(prompt) for prompt in body["input_ids"]]


class Stub:
    """An HTTP server that answers /generate with `answer` and remembers the bodies."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.active = self.most_active = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stub._lock:
                    stub.bodies.append(body)
                    stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                    stub.active += len(body["input_ids"])
                    stub.most_active = max(stub.most_active, stub.active)
                try:
                    status, answer = stub.answer(body)
                finally:
                    with stub._lock:
                        stub.active -= len(body["input_ids"])
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def asked(self) -> list[str]:
        return [rid.rsplit("-", 1)[0] for body in self.bodies for rid in body["rid"]]


@pytest.fixture
def stub() -> Iterator[Callable[[Answer], Stub]]:
    made: list[Stub] = []

    def make(answer: Answer) -> Stub:
        made.append(Stub(answer))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


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
    assert seeds == [sample_seed(3, "r0", 0), sample_seed(3, "r0", 1), sample_seed(3, "r1", 0), sample_seed(3, "r1", 1)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**31 for seed in seeds)
    neutral = {"min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    said = {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "stop_token_ids": [5, 6], **neutral}
    assert body["sampling_params"] == [said] * 4
    assert len(set(body["rid"])) == 4
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert rows[1][0].response_token_ids == (1, 7) and rows[1][0].engine_logprobs == (-0.5, -0.25)
    assert [(span.policy_version, span.start, span.end) for span in rows[1][0].version_spans] == [(4, 0, 1), (5, 1, 2)]


def test_requests_are_dealt_to_all_servers_and_groups_stay_together(stub: Callable[[Answer], Stub]) -> None:
    servers = [stub(all_good), stub(all_good)]
    rows = make_client(*servers).generate(REQUESTS, SAMPLING, num_samples=3)
    assert [len(row) for row in rows] == [3] * 6
    assert [len(server.bodies) for server in servers] == [1, 1]
    assert servers[0].asked == [f"r{i}#{j}" for i in (0, 2, 4) for j in range(3)]


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
        time.sleep(1.0)
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
    rows = make_client(bad, good, request_timeout_s=0.3).generate(REQUESTS, SAMPLING, num_samples=2, on_generation=seen.append)
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


def test_two_requests_with_one_id_are_refused(stub: Callable[[Answer], Stub]) -> None:
    with pytest.raises(ValueError, match="same request_id"):
        make_client(stub(all_good)).generate([REQUESTS[0], REQUESTS[0]], SAMPLING, num_samples=1)


def test_no_requests_give_no_responses(stub: Callable[[Answer], Stub]) -> None:
    assert make_client(stub(all_good)).generate([], SAMPLING, num_samples=1) == []


def test_what_on_generation_raises_comes_out_as_it_is(stub: Callable[[Answer], Stub]) -> None:
    def stop(_: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_client(stub(all_good)).generate(REQUESTS, SAMPLING, num_samples=1, on_generation=stop)
