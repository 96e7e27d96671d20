"""What is sent to OpenAI's endpoints and read from them. Real servers answer in tests/end_to_end/test_evaluate.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.evaluation.endpoints import OpenAISource, openai_body, read_openai, served_model
from megatron_minpro.evaluation.responses import Response
from rollout.client import RolloutFailed, response_seed
from rollout.records import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=9, temperature=1.0, top_p=0.7, top_k=-1, stop_token_ids=(3,), seed=5)


def prompt(*token_ids: int) -> Prompt:
    return Prompt(prompt_id="p0", text="1 + 1 = ?", token_ids=token_ids or (7, 8), answer="2", source="set")


def answer(text: str = "2", finish_reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish_reason}], "usage": {"completion_tokens": 4}}


def test_completions_get_the_native_apis_token_ids_and_every_setting() -> None:
    body = openai_body(prompt(), 0, SAMPLING, api="completions", model="m")
    assert body["prompt"] == [7, 8] and "messages" not in body
    said = {
        name: body[name]
        for name in (
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "stop_token_ids",
            "skip_special_tokens",
            "n",
        )
    }
    assert said == {
        "max_tokens": 9, "temperature": 1.0, "top_p": 0.7, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "stop_token_ids": [3], "skip_special_tokens": True, "n": 1,
    }  # fmt: skip
    assert body["seed"] == response_seed(5, "set/p0/0", 0) != openai_body(prompt(), 1, SAMPLING, api="completions", model="m")["seed"]


def test_chat_is_sent_the_text() -> None:
    body = openai_body(prompt(), 0, SAMPLING, api="chat", model="m")
    assert body["messages"] == [{"role": "user", "content": "1 + 1 = ?"}] and "prompt" not in body
    brief = replace(prompt(), preceding=({"role": "system", "content": "Be brief."},))
    assert [message["role"] for message in openai_body(brief, 0, SAMPLING, api="chat", model="m")["messages"]] == ["system", "user"]


def test_both_kinds_of_answer_are_read() -> None:
    expected = Response(problem_id="p0", sample=0, text="2", finish_reason="stop", num_tokens=4)
    assert read_openai(answer(), prompt(), 0) == expected
    chat = {"choices": [{"message": {"content": "2"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}
    assert read_openai(chat, prompt(), 0) == expected
    chat["choices"][0]["message"]["content"] = None  # type: ignore[index]
    assert read_openai(chat, prompt(), 0).text == ""  # type: ignore[union-attr]
    assert read_openai(answer(finish_reason="abort"), prompt(), 0) is None


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "function_call"])
def test_an_ending_of_another_kind_is_kept_under_its_name(reason: str) -> None:
    kept = read_openai(answer(text="Answer: 7", finish_reason=reason), prompt(), 0)
    assert kept == Response(problem_id="p0", sample=0, text="Answer: 7", finish_reason=reason, num_tokens=4)
    called = {"choices": [{"message": {"content": None, "tool_calls": []}, "finish_reason": reason}], "usage": {"completion_tokens": 4}}
    assert read_openai(called, prompt(), 0) == Response(
        problem_id="p0", sample=0, text="", finish_reason=reason, num_tokens=4, without_content=True
    )


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_without_content_is_graded_and_marked(field: str) -> None:
    message = {"content": None, field: "So \\boxed{7}"}
    kept = read_openai({"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 4}}, prompt(), 0)
    assert kept is not None and (kept.text, kept.without_content) == ("So \\boxed{7}", True)
    message["content"] = "7"
    kept = read_openai({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}, prompt(), 0)
    assert kept is not None and (kept.text, kept.without_content) == ("7", False)


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        ([], "no single choice"),
        ({"choices": []}, "no single choice"),
        (answer(finish_reason=""), "finish_reason is ''"),
        ({"choices": [{"text": "2"}], "usage": {"completion_tokens": 4}}, "finish_reason is None"),
        ({"choices": [{"text": None, "finish_reason": "stop"}], "usage": {"completion_tokens": 4}}, "lacks its text"),
        ({"choices": [{"text": "2", "finish_reason": "stop"}]}, r"usage\.completion_tokens"),
    ],
)
def test_strange_answers_are_refused(strange: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_openai(strange, prompt(), 0)


class Handler(BaseHTTPRequestHandler):
    """Fails the first request of every sample; refuses the prompt [400]."""

    seen: ClassVar[set[int]] = set()

    engine_is_dead: ClassVar[bool] = False

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(503 if self.engine_is_dead else 200, {})
            return
        self._reply(200, {"data": [{"id": "tiny"}] if self.path == "/v1/models" else [{"id": "a"}, {"id": "b"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["prompt"] == [400]:
            self._reply(400, {"error": "too long"})
        elif body["prompt"] == [500]:
            message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
            self._reply(500, {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}})
        elif body["prompt"] == [503] or body["seed"] not in self.seen:
            self.seen.add(body["seed"])
            self._reply(503, {})
        else:
            self._reply(200, answer(text=f"{body['model']} {self.headers['authorization']}"))

    def _reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def flaky() -> Iterator[str]:
    Handler.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def source(flaky: str) -> Callable[..., OpenAISource]:
    def make(**changed: Any) -> OpenAISource:
        fields = {
            "api": "completions",
            "tokenizer": None,
            "model": "tiny",
            "api_key": "k",
            "concurrency": 3,
            "request_timeout_s": 20,
            "max_retries": 1,
        }
        return OpenAISource([flaky, f"{flaky}/v1"], **{**fields, "backoff_s": 0.01, **changed})

    return make


def test_failed_requests_are_sent_again_and_every_sample_arrives_once(source: Callable[..., OpenAISource]) -> None:
    kept: list[tuple[Prompt, Response]] = []
    drawn: list[int] = []

    def all_wanted() -> Iterator[tuple[Prompt, int]]:
        for sample in range(20):
            drawn.append(sample)
            assert sample - len(kept) <= 3  # memory: no more are drawn than are under way
            yield prompt(), sample

    source().run(all_wanted(), SAMPLING, lambda asked, response: kept.append((asked, response)))
    assert sorted(response.sample for _, response in kept) == list(range(20)) == drawn
    assert {response.text for _, response in kept} == {"tiny Bearer k"}
    assert all(asked == prompt() for asked, _ in kept)


def test_a_refused_or_failing_request_ends_with_its_reason(source: Callable[..., OpenAISource]) -> None:
    def ask(token: int) -> None:
        source().run([(prompt(token), 0)], SAMPLING, lambda *_: None)

    with pytest.raises(RolloutFailed, match=r"/v1/completions: set/p0/0: HTTP 400: .*too long"):
        ask(400)
    with pytest.raises(RolloutFailed, match=r"HTTP 503.*gave up after 2 attempts"):
        ask(503)


def test_a_server_whose_engine_has_died_is_one_line(source: Callable[..., OpenAISource], monkeypatch: pytest.MonkeyPatch) -> None:
    sample = (prompt(500), 0)
    said = "HTTP 500: EngineCore encountered an issue. See stack trace (above) for the root cause."
    with pytest.raises(RolloutFailed) as alive:
        source().run([sample], SAMPLING, lambda *_: None)
    assert f"/v1/completions: set/p0/0: {said} (gave up after 2 attempts)" in str(alive.value)
    monkeypatch.setattr(Handler, "engine_is_dead", True)
    with pytest.raises(RolloutFailed) as dead:
        source().run([sample], SAMPLING, lambda *_: None)
    assert f"set/p0/0: its engine has died, the server's log says why ({said}) (gave up after 2 attempts)" in str(dead.value)
    assert "\n" not in str(dead.value)


def test_the_served_model_is_asked_for(flaky: str) -> None:
    assert served_model(flaky, api_key=None) == served_model(f"{flaky}/v1/", api_key=None) == "tiny"
    with pytest.raises(ValueError, match="serves a, b; choose one with --model-name"):
        served_model(f"{flaky}/other", api_key=None)
    with pytest.raises(RuntimeError, match="cannot be asked for its models"):
        served_model("http://127.0.0.1:9", api_key=None)
