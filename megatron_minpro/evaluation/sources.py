"""Opening the servers that a plan samples from: our own, or running ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from checkpoints_convert.hf_config import read_config
from megatron_minpro.evaluation import folder as places
from megatron_minpro.evaluation.checkpoint import hugging_face_folder
from megatron_minpro.evaluation.endpoints import NativeSource, OpenAISource, SampleSource, served_model
from megatron_minpro.evaluation.plan import Plan
from megatron_minpro.evaluation.request import Serving
from parallel.capabilities import detect
from rollout.client import GenerationClient
from rollout.sglang.server import ServerPool, ServerSettings, read_key
from rollout.weights.loaded import check_pool


@contextmanager
def open_source(plan: Plan, *, announce: Callable[[str], None]) -> Iterator[SampleSource]:
    """Where samples come from while the block lasts; servers of our own end with it.

    Raises ValueError for settings that cannot be used, rollout.sglang.server.ServerDied when a server does not start.
    """
    serving = plan.request.serving
    api_key = None if serving.api_key_path is None else read_key(serving.api_key_path, name="--api-key-file")
    with nullcontext() if serving.endpoints else _own_servers(plan, announce=announce) as pool:
        endpoints = serving.endpoints if pool is None else tuple(pool.endpoints)
        if serving.api != "native":
            yield _openai(plan, endpoints, api_key=api_key)
            return
        client = GenerationClient(
            endpoints,
            api_key=api_key,
            request_timeout_s=serving.request_timeout_s,
            max_retries=serving.max_retries,
            max_in_flight=serving.concurrency,
        )
        yield NativeSource(client, plan.tokenizer)


def _own_servers(plan: Plan, *, announce: Callable[[str], None]) -> ServerPool:
    assert plan.location is not None
    request, logs = plan.request, plan.out / places.LOGS_FOLDER
    folder = hugging_face_folder(plan.location, converted=plan.out / places.CONVERTED_FOLDER, announce=announce)
    announce(f"starting {request.serving.servers} server(s) for {folder}; logs in {logs}")
    pool = ServerPool.start(
        _server_settings(request.serving, folder, seed=request.seed),
        num_servers=request.serving.servers,
        log_dir=logs,
        start_timeout_s=request.serving.start_timeout_s,
    )
    check_pool(pool)
    return pool


def _openai(plan: Plan, endpoints: Sequence[str], *, api_key: str | None) -> OpenAISource:
    serving = plan.request.serving
    assert serving.api != "native"
    return OpenAISource(
        endpoints,
        api=serving.api,
        tokenizer=plan.tokenizer,
        model=served_model(endpoints[0], api_key=api_key) if serving.model_name is None else serving.model_name,
        api_key=api_key,
        concurrency=serving.concurrency,
        request_timeout_s=serving.request_timeout_s,
        max_retries=serving.max_retries,
    )


def _server_settings(serving: Serving, folder: Path, *, seed: int) -> ServerSettings:
    config = read_config(folder)
    stored = str(config.get("dtype", config.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    return ServerSettings(
        model_path=folder,
        device=detect().device_type,
        tp=serving.tp,
        dtype=stored if serving.dtype is None else serving.dtype,
        seed=seed,
        deterministic=False,
        text_api=serving.api != "native",
        options=serving.options,
    )
