"""What an evaluation was asked for, and the checked plan that it becomes; nothing is written or started here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_convert.checkpoint_location import CheckpointLocation
from checkpoints_convert.policy_folder import load_tokenizer
from checkpoints_convert.servable import refuse_unservable
from megatron_minpro.data.end_tokens import end_token_ids
from megatron_minpro.data.prompts import encode_conversations
from megatron_minpro.data.wrappers import WRAPPERS, wrap
from megatron_minpro.evaluation.benchmarks import choose_benchmarks
from megatron_minpro.evaluation.checkpoint import find_checkpoint, largest_length
from megatron_minpro.evaluation.grading import make_grader
from megatron_minpro.evaluation.problems import Problem, read_problems
from megatron_minpro.evaluation.request import EvaluationRequest, Serving
from megatron_minpro.evaluation.settings import (
    BenchmarkSettings,
    EvaluationSettings,
    GradingSettings,
    SamplingSettings,
    digest,
    merged,
    read_settings,
    weights_digest,
)
from rollout.records import SamplingParams

BARE = "bare"  # a style without a wrapper: the question alone, for models that were trained so
TokenIds = tuple[int, ...]
_USUAL_GRADER = "math_verify"
_USUAL_GRADING_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked request: what would be sampled under which settings."""

    request: EvaluationRequest
    out: Path  # absolute, like every path below
    location: CheckpointLocation | None  # None: only the server has it
    tokenizer: Any  # None: the server has it
    settings: EvaluationSettings
    problems: Mapping[str, Sequence[Problem]]
    prompts: Mapping[str, Sequence[TokenIds]]  # beside problems; empty prompts where the server applies its own template
    sampling: SamplingParams

    @property
    def num_responses(self) -> int:
        return sum(chosen.samples * chosen.num_problems for chosen in self.chosen.values())

    @property
    def chosen(self) -> dict[str, BenchmarkSettings]:
        """The benchmarks that this request asks for."""
        return {name: self.settings.benchmarks[name] for name in self.problems}


def plan(request: EvaluationRequest) -> Plan:
    """Read the problems and compare with what the folder holds; writes nothing. Raises ValueError for all that cannot work."""
    if request.checkpoint is None:
        raise ValueError("CHECKPOINT is missing")
    _check_serving(request.serving)
    benchmarks = choose_benchmarks(request.chosen)
    out = Path("evaluation" if request.out is None else request.out).absolute()
    served_only = request.serving.api == "chat" and not Path(request.checkpoint).exists()
    location = None if served_only else find_checkpoint(Path(request.checkpoint).absolute(), config=request.config)
    if location is not None and not request.serving.endpoints:
        refuse_unservable(location.model)
    if request.style not in (*WRAPPERS, BARE):
        raise ValueError(f"--style {request.style}: expected one of {', '.join((*WRAPPERS, BARE))}")
    sampling = SamplingParams(
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=-1,
        stop_token_ids=(),
        seed=request.seed,
    )
    grading = GradingSettings(
        grader=_USUAL_GRADER if request.grader is None else request.grader,
        timeout_s=_USUAL_GRADING_TIMEOUT_S if request.grading_timeout is None else request.grading_timeout,
    )
    make_grader(grading.grader, style=request.style, timeout_s=grading.timeout_s, workers=request.grading_workers).close()
    problems = {benchmark.name: read_problems(benchmark, data=request.data, limit=request.limit) for benchmark in benchmarks}
    tokenizer = None
    prompts: dict[str, list[TokenIds]] = {name: [()] * len(items) for name, items in problems.items()}
    if location is not None:
        tokenizer = load_tokenizer(location.model)
        sampling = replace(sampling, stop_token_ids=end_token_ids(location.model, tokenizer, extra=request.end_tokens))
    elif request.end_tokens:
        raise ValueError(f"--end-token {request.end_tokens[0]}: the tokenizer of {request.checkpoint} is not here to look it up")
    if location is not None and request.serving.api != "chat":
        prompts = {name: _encoded(items, request, tokenizer, model=location.model) for name, items in problems.items()}
    wanted = EvaluationSettings(
        sampling=SamplingSettings(
            checkpoint=request.checkpoint if location is None else str(location.weights.resolve()),
            weights="served" if location is None else weights_digest(location.weights),
            api="chat" if request.serving.api == "chat" else "token_ids",
            style=request.style,
            temperature=request.temperature,
            top_p=request.top_p,
            max_new_tokens=request.max_new_tokens,
            end_token_ids="served" if location is None else " ".join(map(str, sampling.stop_token_ids)),
            seed=request.seed,
        ),
        grading=grading,
        benchmarks={
            benchmark.name: BenchmarkSettings(
                title=benchmark.title,
                samples=benchmark.num_samples if request.samples is None else request.samples,
                num_problems=len(problems[benchmark.name]),
                problems=digest([asdict(problem) for problem in problems[benchmark.name]]),
                prompts=digest([[wrapped(item, request.style) for item in problems[benchmark.name]], prompts[benchmark.name]]),
            )
            for benchmark in benchmarks
        },
    )
    kept = read_settings(out)
    settings = wanted if kept is None else merged(kept, wanted, folder=out)
    return Plan(
        request=request,
        out=out,
        location=location,
        tokenizer=tokenizer,
        settings=settings,
        problems=problems,
        prompts=prompts,
        sampling=sampling,
    )


def wrapped(problem: Problem, style: str) -> str:
    """The user message. A question that its file holds with a wrapper around it is not wrapped again."""
    return problem.question if style == BARE else wrap(problem.question, WRAPPERS[style])


def _encoded(problems: Sequence[Problem], request: EvaluationRequest, tokenizer: Any, *, model: Path) -> list[TokenIds]:
    """Prompts as token ids. Raises ValueError where prompt and response together can be longer than the model."""
    prompts = encode_conversations(
        tokenizer, [[*problem.preceding, {"role": "user", "content": wrapped(problem, request.style)}] for problem in problems]
    )
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    limit = largest_length(model)
    if limit is not None and len(prompts[longest]) + request.max_new_tokens > limit:
        raise ValueError(
            f"--max-new-tokens {request.max_new_tokens}: with the {len(prompts[longest])} tokens of problem {problems[longest].problem_id} "
            f"that is more than the {limit} positions of {model}"
        )
    return prompts


def _check_serving(serving: Serving) -> None:
    if serving.api_key_path is not None and not serving.endpoints:
        raise ValueError("--api-key-file is for running servers (--endpoint); servers of our own are on loopback and need none")
    if serving.model_name is not None and serving.api == "native":
        raise ValueError("--model-name is for OpenAI servers (--api completions or chat)")
    if serving.api == "chat" and not serving.endpoints:
        raise ValueError("--api chat needs --endpoint: servers of our own are sent token ids")
