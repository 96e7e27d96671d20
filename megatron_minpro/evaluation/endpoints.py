"""Where samples come from: SGLang's native API with token ids, or any server that speaks OpenAI's, such as vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import httpx

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.data.end_tokens import response_text, without_special_tokens
from megatron_minpro.evaluation.responses import Response
from rollout.client import RETRIED_STATUS, GenerationClient, RolloutFailed, response_seed, run_all
from rollout.records import Generation, GenerationRequest, SamplingParams
from rollout.refusals import refusal

Keep = Callable[[Prompt, Response], None]


class SampleSource(Protocol):
    """Draws prompts and sample numbers as servers have places and hands each response to `keep` at once, in this thread.

    The draw of a sample depends on its name and the seed alone, not on which others are asked for (as far as the server repeats itself).
    """

    def run(self, wanted: Iterable[tuple[Prompt, int]], sampling: SamplingParams, keep: Keep) -> None: ...


def request_id(prompt: Prompt, sample: int) -> str:
    """The name of one sample of a benchmark's problem. Its seed depends on it."""
    return f"{prompt.source}/{prompt.prompt_id}/{sample}"


class NativeSource:
    """SGLang's /generate, through the client that training uses."""

    def __init__(self, client: GenerationClient, tokenizer: Any) -> None:
        self._client, self._tokenizer = client, tokenizer

    def run(self, wanted: Iterable[tuple[Prompt, int]], sampling: SamplingParams, keep: Keep) -> None:
        under_way: dict[str, tuple[Prompt, int]] = {}

        def requests() -> Iterator[GenerationRequest]:
            for prompt, sample in wanted:
                name = request_id(prompt, sample)
                under_way[name] = prompt, sample
                yield GenerationRequest(request_id=name, prompt_token_ids=prompt.token_ids)

        def arrived(request: GenerationRequest, generation: Generation) -> None:
            prompt, sample = under_way.pop(request.request_id)
            text = response_text(self._tokenizer, generation.response_token_ids, end_ids=sampling.stop_token_ids)
            keep(prompt, _response(prompt, sample, text, generation.finish_reason, len(generation.response_token_ids)))

        self._client.stream(requests(), sampling, on_generation=arrived)


class OpenAISource:
    """/v1/completions (token ids in, text out) or /v1/chat/completions (the server's own chat template).

    tokenizer: of the model, to clean texts of special tokens; None: only the server has it. model: as the server calls it.
    concurrency: requests under way at once. A request that fails in passing is sent again, elsewhere.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        api: Literal["completions", "chat"],
        tokenizer: Any,
        model: str,
        api_key: str | None,
        concurrency: int,
        request_timeout_s: float,
        max_retries: int,
        backoff_s: float = 0.5,
    ) -> None:
        self._endpoints = tuple(endpoint.rstrip("/").removesuffix("/v1") for endpoint in endpoints)
        self._api, self._tokenizer, self._model, self._concurrency = api, tokenizer, model, concurrency
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._request_timeout_s, self._max_retries, self._backoff_s = request_timeout_s, max_retries, backoff_s

    def run(self, wanted: Iterable[tuple[Prompt, int]], sampling: SamplingParams, keep: Keep) -> None:
        asyncio.run(self._run(enumerate(wanted), sampling, keep))

    async def _run(self, source: Iterator[tuple[int, tuple[Prompt, int]]], sampling: SamplingParams, keep: Keep) -> None:
        timeout = httpx.Timeout(self._request_timeout_s, connect=min(10.0, self._request_timeout_s))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits, trust_env=False) as http:

            async def draw() -> None:
                for index, (prompt, sample) in source:  # shared by all: each sample goes to one of them
                    keep(prompt, await self._ask(http, prompt, sample, sampling, first_endpoint=index))

            await run_all([draw() for _ in range(self._concurrency)])

    async def _ask(
        self, http: httpx.AsyncClient, prompt: Prompt, sample: int, sampling: SamplingParams, *, first_endpoint: int
    ) -> Response:
        path = "/v1/completions" if self._api == "completions" else "/v1/chat/completions"
        body, name = openai_body(prompt, sample, sampling, api=self._api, model=self._model), request_id(prompt, sample)
        failure = endpoint = ""
        for attempt in range(self._max_retries + 1):
            endpoint = self._endpoints[(first_endpoint + attempt) % len(self._endpoints)]
            if attempt:
                await asyncio.sleep(min(30.0, self._backoff_s * 2 ** (attempt - 1)))
            try:
                answer = await http.post(endpoint + path, json=body)
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code in RETRIED_STATUS:
                failure = refusal(answer.status_code, answer.text)
                if await self._engine_is_dead(http, endpoint):
                    failure = f"its engine has died, the server's log says why ({failure})"
                continue
            if answer.status_code != 200:
                raise RolloutFailed(f"{endpoint}{path}: {name}: {refusal(answer.status_code, answer.text)}")
            try:
                response = read_openai(answer.json(), prompt, sample)
            except ValueError as error:
                raise RolloutFailed(f"{endpoint}{path}: {name}: {error}") from error
            if response is not None:
                return (
                    response if self._tokenizer is None else replace(response, text=without_special_tokens(self._tokenizer, response.text))
                )
            failure = "aborted by the server"
        raise RolloutFailed(f"{endpoint}{path}: {name}: {failure} (gave up after {self._max_retries + 1} attempts)")

    async def _engine_is_dead(self, http: httpx.AsyncClient, endpoint: str) -> bool:
        """A server process may outlive its engine: vLLM's /health then answers 503. A server that cannot be asked is not called dead."""
        try:
            return (await http.get(f"{endpoint}/health", timeout=5.0)).status_code >= 500
        except httpx.HTTPError:
            return False


def openai_body(
    prompt: Prompt, sample: int, sampling: SamplingParams, *, api: Literal["completions", "chat"], model: str
) -> dict[str, Any]:
    """The request. Every sampling setting is said: vLLM would otherwise take top_k and others from the model's generation_config.json."""
    asked: dict[str, Any] = {"prompt": list(prompt.token_ids)} if api == "completions" else {"messages": prompt.messages}
    if sampling.seed is not None:
        asked["seed"] = response_seed(sampling.seed, request_id(prompt, sample), 0)
    return {
        **asked,
        "model": model,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "skip_special_tokens": True,
        "n": 1,
        "stream": False,
    }


def read_openai(answer: Any, prompt: Prompt, sample: int) -> Response | None:
    """The response in an answer of either OpenAI API.

    One sample's fate must not end an evaluation: whatever reason a server gives for ending a response is kept as it is. Where a reasoning
    parser left no content, the reasoning is the text, marked as such: the native API would have graded the same tokens.

    Args:
        answer: the decoded JSON.
        prompt, sample: what was asked for.

    Returns:
        The response; None when the server aborted it.

    Raises:
        ValueError: saying what is wrong with the answer.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1:
        raise ValueError(f"the answer holds no single choice: {str(answer)[:200]}")
    finish_reason = choices[0].get("finish_reason")
    if finish_reason == "abort":
        return None
    if not isinstance(finish_reason, str) or not finish_reason:
        raise ValueError(f"finish_reason is {finish_reason!r}, expected stop, length or another word")
    message = choices[0].get("message")
    text = choices[0].get("text") if message is None else message.get("content")
    without_content = message is not None and text is None
    if without_content:
        text = message.get("reasoning_content") or message.get("reasoning") or ""
    num_tokens = (answer.get("usage") or {}).get("completion_tokens")
    if not isinstance(text, str) or not isinstance(num_tokens, int):
        raise ValueError(f"the answer lacks its text or usage.completion_tokens: {str(answer)[:200]}")
    return replace(_response(prompt, sample, text, finish_reason, num_tokens), without_content=without_content)


def served_model(endpoint: str, *, api_key: str | None, timeout_s: float = 30.0) -> str:
    """The name of the one model a server has. Raises RuntimeError when it cannot be asked, ValueError when it has several."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    address = f"{endpoint.rstrip('/').removesuffix('/v1')}/v1/models"
    try:
        answer = httpx.get(address, headers=headers, timeout=timeout_s, trust_env=False)
        answer.raise_for_status()
        names = [model["id"] for model in answer.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{address}: cannot be asked for its models: {error}") from error
    if len(names) != 1:
        raise ValueError(f"{address}: serves {', '.join(names) or 'nothing'}; choose one with --model-name")
    return names[0]


def _response(prompt: Prompt, sample: int, text: str, finish_reason: str, num_tokens: int) -> Response:
    return Response(problem_id=prompt.prompt_id, sample=sample, text=text, finish_reason=finish_reason, num_tokens=num_tokens)
