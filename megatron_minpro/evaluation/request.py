"""What an evaluation is asked for: the records behind the options of `minpro evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_minpro.option import Option

Api = Literal["native", "completions", "chat"]


def _server_options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--server-option {pair}: expected KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options


def _endpoints(addresses: list[str]) -> tuple[str, ...]:
    for address in addresses:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {address}: expected http://host:port")
    return tuple(addresses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where responses come from."""

    endpoints: Annotated[
        tuple[str, ...],
        Option(
            "URL of a running server; repeat for several; without it servers are started",
            flags=("--endpoint",),
            given=list[str],
            read=_endpoints,
        ),
    ] = ()
    api: Annotated[Api, Option("SGLang's own API, or OpenAI's (vLLM too): completions sends token ids, chat text")] = "native"
    model_name: Annotated[str | None, Option("what an OpenAI server calls the model; default: its only one")] = None
    api_key_path: Annotated[Path | None, Option("one-line file with the key that requests must carry", flags=("--api-key-file",))] = None
    servers: Annotated[int, Option("to start", minimum=1)] = 1
    tp: Annotated[int, Option("tensor parallelism of each server to start", minimum=1)] = 1
    dtype: Annotated[str | None, Option("of the servers to start: float32, bfloat16, float16; default the checkpoint's")] = None
    options: Annotated[
        Mapping[str, Any],
        Option(
            "further SGLang server argument; repeatable",
            flags=("--server-option",),
            metavar="KEY=VALUE",
            given=list[str],
            read=_server_options,
        ),
    ] = field(default_factory=dict)
    concurrency: Annotated[int, Option("responses under way at once, over all servers", minimum=1)] = 256
    start_timeout_s: Annotated[float, Option("seconds until a server must be ready", flags=("--start-timeout",))] = 1800.0
    request_timeout_s: Annotated[float, Option("seconds for one response", flags=("--request-timeout",))] = 7200.0
    max_retries: Annotated[int, Option("further attempts for a response", minimum=0)] = 3


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkChoice:
    """Which benchmarks; how the rows of a file or data set of the user's own are laid out."""

    benchmarks: Annotated[
        tuple[str, ...],
        Option(
            "comma-separated: amc23, aime24, aime25, math500, olympiadbench, minerva_math, gsm8k; files; owner/name of data sets",
            given=str,
            read=_names,
        ),
    ] = ()
    question_field: Annotated[str, Option("of a file or data set of your own: dotted path in a row")] = "question"
    answer_field: Annotated[str, Option("of a file or data set of your own: dotted path in a row")] = "answer"
    answer_format: Annotated[str, Option("of a file or data set of your own: plain, after_hashes or boxed")] = "plain"
    split: Annotated[str | None, Option("of a data set of your own; default test")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """Everything that decides what is sampled and how it is graded."""

    checkpoint: Annotated[
        str | None,
        Option("Hugging Face or Megatron folder, a run or one of its checkpoints; with --api chat a served model's name", argument=True),
    ] = None
    chosen: BenchmarkChoice = field(default_factory=BenchmarkChoice)
    out: Annotated[Path | None, Option("folder for responses, grades and tables; the same command continues what is there")] = None
    data: Annotated[
        Path | None,
        Option("folder with NAME/test.jsonl; without it the Hugging Face hub, where it has the set", variable="MINPRO_ASSETS"),
    ] = None
    samples: Annotated[int | None, Option("per problem; default 128 for amc23, aime24 and aime25, 2 for the others", minimum=1)] = None
    limit: Annotated[int | None, Option("use only the first N problems of each benchmark", minimum=1)] = None
    temperature: Annotated[float, Option("0: greedy")] = 1.0
    top_p: Annotated[float, Option("nucleus")] = 0.7
    max_new_tokens: Annotated[int, Option("a response is cut here")] = 20480
    end_tokens: Annotated[
        tuple[str, ...],
        Option("a further token that ends a response, beside those that the model's files name; repeatable", flags=("--end-token",)),
    ] = ()
    seed: Annotated[int, Option("of the draws")] = 0
    style: Annotated[str, Option("what the prompt asks for: boxed, dapo (an 'Answer:' line), bare (the question alone)")] = "boxed"
    grader: Annotated[str | None, Option("math_verify (default) or package.module:function")] = None
    grading_timeout: Annotated[float | None, Option("seconds per answer; default 5")] = None
    grading_workers: Annotated[int, Option("processes that compare answers", minimum=1)] = 2
    config: Annotated[Path | None, Option("of a Megatron checkpoint: folder with config.json and tokenizer; a run's own is found")] = None
    serving: Serving = field(default_factory=Serving)
