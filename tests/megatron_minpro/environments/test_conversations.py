"""Conversations with a session whose answers are known: who is asked what, together with whom, and what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.environments.conversations import hold_conversations
from megatron_minpro.environments.environment import Environment, make_environment
from megatron_minpro.environments.model import Model
from megatron_minpro.registry import PlugInError
from rollout.background import in_background
from rollout.client import OnGeneration, WeightsMissing
from rollout.records import Generation, GenerationRequest, VersionSpan
from tests.megatron_minpro.conftest import unjudged

END = 99


class Tokenizer:
    """A token's text is its number; 98 and the end token are special."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token_id) for token_id in token_ids if token_id < 98)


class Session:
    """Answers with the last token of the context plus one, and the end token. Keeps what was asked, call by call."""

    def __init__(self, *, samples_per_call: int | None = None, slow: Callable[[GenerationRequest], float] = lambda request: 0.0) -> None:
        self.settings = SimpleNamespace(samples_per_call=samples_per_call, is_rolling=False)
        self.open: Counter[str] = Counter()  # conversations under way, by the name of their requests
        self.calls: list[list[GenerationRequest]] = []
        self.slow = slow
        self.fails = False

    def begin(self, request_ids: Iterable[str]) -> None:
        self.open.update(request_ids)

    def end(self, request_id: str) -> None:
        self.open[request_id] -= 1

    async def generate(self, requests: Sequence[GenerationRequest], *, on_generation: OnGeneration | None = None) -> list[Generation]:
        self.calls.append(list(requests))
        if self.fails:
            raise WeightsMissing("all servers were restarted")
        answers = []
        for request in requests:
            await asyncio.sleep(self.slow(request))
            response = (request.prompt_token_ids[-1] + 1, END)
            answers.append(
                Generation(
                    request_id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    response_token_ids=response,
                    engine_logprobs=(-0.5, -0.25),
                    version_spans=(VersionSpan(policy_version=3, start=0, end=2),),
                    finish_reason="stop",
                    latency_s=0.0,
                    num_retries=0,
                )
            )
            if on_generation is not None:
                on_generation(request, answers[-1])
        return answers

    @property
    def asked(self) -> list[list[tuple[str, int]]]:
        return [[(request.name, request.prompt_token_ids[-1]) for request in call] for call in self.calls]


PROMPTS = [Prompt(prompt_id=f"p{n}", text=f"q{n}", token_ids=(7, 10 * n), answer="", source="test") for n in range(2)]


def hold(environment: Environment, session: Session, *, max_new_tokens: int = 12) -> list[Conversation]:
    return hold_and_judge(environment, session, unjudged, max_new_tokens=max_new_tokens)


def hold_and_judge(
    environment: Environment, session: Session, judge: Callable[[Conversation], Any], *, max_new_tokens: int = 12
) -> list[Any]:
    return asyncio.run(
        hold_conversations(
            environment,
            PROMPTS,
            session=session,  # type: ignore[arg-type]
            tokenizer=Tokenizer(),
            end_ids=(END,),
            max_new_tokens=max_new_tokens,
            num_samples=2,
            request_prefix="step5",
            judge=judge,
        )
    )


def environment(function: Any, **options: Any) -> Environment:
    return Environment(name="mine", function=function, options=options)


async def echo(prompt: Prompt, model: Model, *, turns: Callable[[Prompt], int], pause: Callable[[], float] = lambda: 0.0) -> Conversation:
    """A tool that says 50 after every answer but the last."""
    answers = [await model(prompt.token_ids)]
    while len(answers) < turns(prompt):
        await asyncio.sleep(pause())
        answers.append(await model((*answers[-1].prompt_token_ids, *answers[-1].response_token_ids, 50)))
    return model.conversation(*answers)


def test_one_answer_to_every_prompt_is_asked_for_in_one_call() -> None:
    session = Session()
    found = hold(make_environment("single_turn"), session)
    assert session.asked == [[("step5-0#0", 0), ("step5-0#1", 0), ("step5-1#0", 10), ("step5-1#1", 10)]]
    assert [request.max_new_tokens for request in session.calls[0]] == [12] * 4
    assert [(c.prompt.prompt_id, c.response, c.text, c.num_response_tokens) for c in found[1:3]] == [
        ("p0", "1", "1", 2),
        ("p1", "11", "11", 2),
    ]
    assert found[2].token_ids == (7, 10, 11, END) and found[2].loss_mask == [False, False, True, True]


def test_tool_tokens_are_in_the_sequence_and_not_in_the_mask() -> None:
    [found, *_] = hold(environment(echo, turns=lambda prompt: 2), Session())
    assert found.token_ids == (7, 0, 1, END, 50, 51, END)
    assert found.loss_mask == [False, False, True, True, False, True, True]
    assert [(turn.author, turn.text) for turn in found.turns] == [("model", "1"), ("environment", "50"), ("model", "51")]
    assert (found.text, found.response, found.finish_reason) == ("1 50 51", "51", "stop")
    assert (found.num_response_tokens, len(found.engine_logprobs), found.version_spans[0].end) == (4, 4, 4)


def test_calls_on_a_cpu_do_not_depend_on_the_timing_of_tools() -> None:
    def calls(pauses: list[float]) -> list[list[tuple[str, int]]]:
        session = Session()
        hold(environment(echo, turns=lambda prompt: 3 if prompt.prompt_id == "p0" else 2, pause=iter(pauses).__next__), session)
        return session.asked

    expected = [
        [("step5-0#0", 0), ("step5-0#1", 0), ("step5-1#0", 10), ("step5-1#1", 10)],
        [("step5-0#0.1", 50), ("step5-0#1.1", 50), ("step5-1#0.1", 50), ("step5-1#1.1", 50)],
        [("step5-0#0.2", 50), ("step5-0#1.2", 50)],
    ]
    assert calls([0.0] * 6) == calls([0.03, 0.0, 0.02, 0.01, 0.02, 0.0]) == expected


def test_with_small_calls_nobody_waits_for_a_slow_conversation() -> None:
    session = Session(samples_per_call=2, slow=lambda request: 0.05 if request.turn == 0 and request.name == "step5-1#1" else 0.0)
    hold(environment(echo, turns=lambda prompt: 2), session)
    first, *later = session.asked
    assert len(first) == 4
    assert [name for call in later for name, _ in call][-1] == "step5-1#1.1"
    assert len(later) > 1, "the second answers were asked for as they could be"


@pytest.mark.parametrize("is_rolling", [True, False])
def test_a_conversation_ends_when_it_is_answered_if_servers_are_rolling(is_rolling: bool) -> None:
    open_at_last: list[int] = []
    session = Session(slow=lambda request: open_at_last.append(session.open.total()) or 0.01)
    session.settings.is_rolling = is_rolling
    hold(make_environment("single_turn"), session)
    assert open_at_last == ([4, 4, 3, 2] if is_rolling else [4] * 4)
    assert session.open == {"step5-0": 0, "step5-1": 0}


def test_what_is_left_of_the_limit_bounds_every_answer() -> None:
    session = Session()
    hold(environment(echo, turns=lambda prompt: 3), session)
    assert [call[0].max_new_tokens for call in session.calls] == [12, 9, 6]


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        ("nothing", "expected model.conversation"),
        ("no answer", "a conversation without an answer of the model; there is nothing to train"),
        ("of another", "an answer that the model did not give; its log-probs belong to no policy"),
        ("rewritten", "answer 1 of the model was given to other tokens than the conversation holds before it"),
        ("too long", "a conversation of 14 tokens, and 12 are allowed"),
        ("no room", "the context has 12 tokens, and 12 are allowed"),
        ("broken", "KeyError: 'tool'"),
    ],
)
def test_an_untrainable_conversation_names_environment_and_prompt(strange: str, message: str) -> None:
    async def misbehave(prompt: Prompt, model: Model) -> Any:
        answer = await model(prompt.token_ids)
        if strange == "nothing":
            return None
        if strange == "no answer":
            return model.conversation()
        if strange == "of another":
            return model.conversation(Generation(**{name: getattr(answer, name) for name in Generation.__slots__}))
        if strange == "rewritten":
            return model.conversation(answer, await model((7, 8, 9, 10, 11)))
        if strange == "too long":
            return model.conversation(answer, closing=(1,) * 10)
        if strange == "no room":
            return await model((1,) * 12)
        return {}["tool"]

    with pytest.raises(RuntimeError, match=rf"^environment mine: p0: .*{message}"):
        hold(environment(misbehave), Session(), max_new_tokens=10)


def test_a_context_is_token_ids_of_any_kind_or_messages() -> None:
    async def ask(prompt: Prompt, model: Model, *, context: Any) -> Conversation:
        return model.conversation(await model(context))

    session = Session()
    hold(environment(ask, context=np.array([7, 10])), session)
    [(first, *_)] = session.calls
    assert first.prompt_token_ids == (7, 10) and {type(token_id) for token_id in first.prompt_token_ids} == {int}
    for context, kinds in ((torch.tensor([7, 10]), "Tensor"), ([7, {"role": "user", "content": "8"}], "dict and int")):
        with pytest.raises(RuntimeError, match=rf"p0: ValueError: the context holds {kinds}, expected token ids \(whole numbers\) or"):
            hold(environment(ask, context=context), Session())


def test_weights_that_are_missing_are_not_the_environments_fault() -> None:
    session = Session()
    session.fails = True
    with pytest.raises(WeightsMissing, match=r"^all servers were restarted$"):
        hold(environment(echo, turns=lambda prompt: 2), session)


@pytest.mark.parametrize("samples_per_call", [None, 2])
@pytest.mark.parametrize("behaviour", ["gives up waiting", "ends with a question that nobody awaits"])
def test_a_question_that_nobody_waits_for_holds_up_nobody(behaviour: str, samples_per_call: int | None) -> None:
    async def impatient(prompt: Prompt, model: Model) -> Conversation:
        answers = [await model(prompt.token_ids)]
        context = (*answers[0].prompt_token_ids, *answers[0].response_token_ids, 50)
        if prompt.prompt_id == "p1":
            await asyncio.sleep(0.05)  # a slow tool
            answers.append(await model(context))
        elif behaviour == "gives up waiting":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(model(context), timeout=0.01)
        else:
            stray.append(asyncio.ensure_future(model(context)))
            await asyncio.sleep(0)
        return model.conversation(*answers)

    stray: list[asyncio.Future[Generation]] = []
    session = Session(samples_per_call=samples_per_call)
    found = within_seconds(10, lambda: hold(environment(impatient), session))
    assert [len(conversation.generations) for conversation in found if conversation.prompt.prompt_id == "p1"] == [2, 2]
    assert samples_per_call is not None or session.asked[1:] == [[("step5-1#0.1", 50), ("step5-1#1.1", 50)]]


def within_seconds(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` gives. A test that would wait for ever fails instead."""
    return in_background(work, name="test").result(timeout=seconds)


def test_a_task_that_an_environment_cancelled_ends_the_run_with_a_reason() -> None:
    async def clumsy(prompt: Prompt, model: Model) -> Conversation:
        tool = asyncio.ensure_future(asyncio.sleep(60))
        tool.cancel()
        await tool
        return model.conversation(await model(prompt.token_ids))

    with pytest.raises(RuntimeError, match=r"^environment mine: p0: awaited a task that was cancelled$"):
        within_seconds(10, lambda: hold(environment(clumsy), Session()))


@pytest.mark.parametrize("samples_per_call", [None, 2])
def test_a_conversation_may_ask_two_questions_at_once(samples_per_call: int | None) -> None:
    async def best_of_two(prompt: Prompt, model: Model) -> Conversation:
        drafts = await asyncio.gather(model(prompt.token_ids), model(prompt.token_ids))
        return model.conversation(drafts[1])

    session = Session(samples_per_call=samples_per_call)
    assert len(within_seconds(10, lambda: hold(environment(best_of_two), session))) == 4
    names = sorted(name for call in session.asked for name, _ in call)
    assert names == sorted(f"step5-{number}#{sample}{turn}" for number in (0, 1) for sample in (0, 1) for turn in ("", ".1"))


def test_the_chat_template_stands_between_an_answer_and_the_next(qwen_tokenizer: Any) -> None:
    prompt = Prompt(prompt_id="p", text="?", token_ids=tuple(qwen_tokenizer("<|im_start|>assistant\n")["input_ids"]), answer="", source="t")

    def said(text: str) -> str:
        answer = Generation(
            request_id="r",
            prompt_token_ids=prompt.token_ids,
            response_token_ids=tuple(qwen_tokenizer(text)["input_ids"]),
            engine_logprobs=(-1.0,) * len(qwen_tokenizer(text)["input_ids"]),
            version_spans=(VersionSpan(policy_version=0, start=0, end=len(qwen_tokenizer(text)["input_ids"])),),
            finish_reason="stop",
            latency_s=0.0,
            num_retries=0,
        )
        model = Model(
            prompt,
            tokenizer=qwen_tokenizer,
            end_ids=(151643, 151645),
            max_new_tokens=99,
            request_id="r",
            sample_index=0,
            ask=None,  # type: ignore[arg-type]
        )
        following = model.follow_up(answer, [{"role": "user", "content": "7"}])
        assert following[len(prompt.token_ids) :][: len(answer.response_token_ids)] == answer.response_token_ids
        return qwen_tokenizer.decode(following)

    expected = "<|im_start|>assistant\n3 + 4<|im_end|>\n<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n"
    assert said("3 + 4<|im_end|>") == said("3 + 4") == expected, "the end of the turn is there once, whoever wrote it"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("def talk(prompt, model): ...", {}, "expected a coroutine, async def"),
        ("async def talk(prompt, model, *, calls): ...", {}, "needs the option calls"),
        ("async def talk(prompt, model, *, calls=1): ...", {"call": 2}, "no such option; did you mean 'calls'"),
        ("async def talk(prompt): ...", {}, "takes 1 arguments by position, expected 2 before its options"),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(
    users_module: Callable[[str], str], text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlugInError, match=message):
        make_environment(f"{users_module(text)}:talk", **options)


def test_a_known_name_is_suggested() -> None:
    with pytest.raises(PlugInError, match=r"^environment\.name = 'single_trun': unknown; did you mean 'single_turn'"):
        make_environment("single_trun")


def test_a_conversation_is_judged_while_others_go_on() -> None:
    session = Session()
    order: list[tuple[str, int]] = []

    async def judge(conversation: Conversation) -> str:
        name = conversation.prompt.prompt_id
        order.append((name, len(session.asked)))
        return name

    judged = hold_and_judge(environment(echo, turns=lambda prompt: 3 if prompt.prompt_id == "p0" else 1), session, judge)
    assert order == [("p1", 1), ("p1", 1), ("p0", 3), ("p0", 3)]  # with the calls of the servers until then
    assert judged == ["p0", "p0", "p1", "p1"]


@pytest.mark.parametrize("samples_per_call", [None, 1])
def test_an_error_of_the_judge_is_raised_as_itself(samples_per_call: int | None) -> None:
    async def judge(conversation: Conversation) -> None:
        raise ZeroDivisionError(conversation.prompt.prompt_id)

    with pytest.raises(ZeroDivisionError, match=r"^p0$"):
        hold_and_judge(environment(echo, turns=lambda prompt: 1), Session(samples_per_call=samples_per_call), judge)
