"""`minpro evaluate`: the command line of megatron_minpro.evaluation."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class ApiChoice(StrEnum):
    """How servers are spoken to."""

    NATIVE = "native"
    COMPLETIONS = "completions"
    CHAT = "chat"


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Hugging Face or Megatron folder, a run or one of its checkpoints; with --api chat a served model's name"),
    ] = None,
    benchmarks: Annotated[
        str,
        typer.Option(
            help="comma-separated: amc23, aime24, aime25, math500, olympiadbench, minerva_math, gsm8k; files; owner/name of data sets"
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="folder for responses, grades and tables; the same command continues what is there")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(envvar="MINPRO_ASSETS", help="folder with NAME/test.jsonl; without it the Hugging Face hub, where it has the set"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="per problem; default 128 for amc23, aime24 and aime25, 2 for the others")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many problems of each benchmark")] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="a response is cut here")] = 20480,
    end_token: Annotated[list[str] | None, typer.Option(help="a further token that ends a response; repeatable")] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    style: Annotated[
        str, typer.Option(help="what the prompt asks for: boxed, dapo (an 'Answer:' line), bare (the question alone)")
    ] = "boxed",
    grader: Annotated[str | None, typer.Option(help="math_verify (default), final_step, or package.module:function")] = None,
    grading_timeout: Annotated[float | None, typer.Option(help="seconds per answer; default 5")] = None,
    grading_workers: Annotated[int, typer.Option(min=1, help="processes that compare answers")] = 2,
    question_field: Annotated[str, typer.Option(help="of a file or data set of your own: dotted path in a row")] = "question",
    answer_field: Annotated[str, typer.Option(help="of a file or data set of your own: dotted path in a row")] = "answer",
    answer_format: Annotated[str, typer.Option(help="of a file or data set of your own: plain, after_hashes or boxed")] = "plain",
    split: Annotated[str | None, typer.Option(help="of a data set of your own; default test")] = None,
    config: Annotated[
        Path | None, typer.Option(help="of a Megatron checkpoint: folder with config.json and tokenizer; a run's own is found")
    ] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="URL of a running server; repeat for several; without it servers are started")
    ] = None,
    api: Annotated[
        ApiChoice, typer.Option(help="SGLang's own API, or OpenAI's (vLLM too): completions sends token ids, chat text")
    ] = ApiChoice.NATIVE,
    model_name: Annotated[str | None, typer.Option(help="what an OpenAI server calls the model; default: its only one")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="one-line file with the key that requests must carry")] = None,
    servers: Annotated[int, typer.Option(min=1, help="to start")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="tensor parallelism of each server to start")] = 1,
    dtype: Annotated[str | None, typer.Option(help="of the servers to start: float32, bfloat16, float16; default the checkpoint's")] = None,
    server_option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="further SGLang server argument; repeatable")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="responses under way at once, over all servers")] = 256,
    start_timeout: Annotated[float, typer.Option(help="seconds until a server must be ready")] = 1800.0,
    request_timeout: Annotated[float, typer.Option(help="seconds for one response")] = 7200.0,
    max_retries: Annotated[int, typer.Option(min=0, help="further attempts for a response")] = 3,
    rescore: Annotated[bool, typer.Option("--rescore", help="grade the kept responses of --out again, without a server")] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="paired difference B - A of two evaluation folders, with its interval")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, show what would be sampled, start nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Measure pass@k of a checkpoint on mathematical benchmarks; every response is kept, and an interrupted evaluation continues.

    \b
    Example:
      minpro evaluate runs/tiny/policy --benchmarks aime24,math500 --data ../shared --out runs/evaluation
      minpro evaluate MODEL --benchmarks my_problems.jsonl --samples 8 --endpoint http://127.0.0.1:8000 --api completions
      minpro evaluate --rescore --out runs/evaluation --grading-timeout 20
      minpro evaluate --compare runs/evaluation_a runs/evaluation_b
    """
    import json

    def say(text: str) -> None:
        typer.echo(text, err=as_json)

    def result(content: Any) -> None:
        if as_json:
            typer.echo(json.dumps(content, indent=2, ensure_ascii=False))

    if compare is not None:
        if rescore or checkpoint is not None or benchmarks:
            raise ValueError("--compare reads two finished evaluations; leave CHECKPOINT, --benchmarks and --rescore out")
        from megatron_minpro.evaluation.compare import compare_folders

        found = compare_folders(*compare, announce=say)
        say(found.markdown)
        result(found.rows)
        return
    if rescore:
        if out is None:
            raise ValueError("--rescore needs --out, the folder with the kept responses")
        if checkpoint is not None or benchmarks:
            raise ValueError("--rescore grades all that --out holds; leave CHECKPOINT and --benchmarks out")
        from megatron_minpro.evaluation import run

        result(run.rescore(out, grader=grader, timeout_s=grading_timeout, workers=grading_workers, announce=say))
        return
    if checkpoint is None:
        raise ValueError("CHECKPOINT is missing")
    if out is None and not dry_run:
        raise ValueError("--out is missing, the folder for responses, grades and tables")
    from megatron_minpro.evaluation import plan, run
    from megatron_minpro.evaluation.benchmarks import choose_benchmarks

    for address in endpoint or []:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"--endpoint {address}: expected http://host:port")
    request = plan.EvaluationRequest(
        checkpoint=checkpoint,
        config=config,
        benchmarks=tuple(
            choose_benchmarks(
                [name.strip() for name in benchmarks.split(",") if name.strip()],
                question_field=question_field,
                answer_field=answer_field,
                answer_format=answer_format,
                split=split,
            )
        ),
        data=data,
        out=Path("evaluation") if out is None else out,
        samples=samples,
        limit=limit,
        style=style,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        end_tokens=tuple(end_token or ()),
        seed=seed,
        grader="math_verify" if grader is None else grader,
        grading_timeout_s=5.0 if grading_timeout is None else grading_timeout,
        grading_workers=grading_workers,
        serving=plan.Serving(
            api=api.value,
            endpoints=tuple(endpoint or ()),
            model_name=model_name,
            api_key_path=api_key_file,
            servers=servers,
            tp=tp,
            dtype=dtype,
            options=_server_options(server_option or []),
            concurrency=concurrency,
            start_timeout_s=start_timeout,
            request_timeout_s=request_timeout,
            max_retries=max_retries,
        ),
    )
    planned = plan.plan(request)
    for name, chosen in planned.chosen.items():
        say(f"{chosen.title} ({name}): {chosen.num_problems:,} problems x {chosen.samples} samples")
    sampling = f"temperature {temperature:g}, top-p {top_p:g}, style {style}"
    say(f"{planned.num_responses:,} responses of up to {max_new_tokens:,} tokens, {sampling}")
    if dry_run:
        from dataclasses import asdict

        result(asdict(planned.settings))
        return
    result(run.evaluate(planned, announce=say))


def _server_options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--server-option {pair}: expected KEY=VALUE")
        options[key] = yaml.safe_load(value)
    return options
