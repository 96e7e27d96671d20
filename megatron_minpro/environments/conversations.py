"""Many conversations at once: their questions travel to the servers together.

Two ways, decided by the session's `samples_per_call`:

- together (None, on a CPU): as soon as every conversation waits for an answer or has ended, all their questions form one batch, in the
  order of the conversations. So the batches that a server computes depend on what was said and not on timing, and a run repeats bit for
  bit. With `single_turn` this is one batched call per server.
- at once (a number, on GPUs): a question travels as soon as it is asked, and no conversation waits for a slow tool of another one.

With rolling publish a server gets newer weights when the conversations at home there have ended. So an answer is handed over as soon as
its server has given it, in both ways; questions still travel as said above.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.environments.environment import Environment
from megatron_minpro.environments.model import Model
from rollout.client import GenerationSession, RolloutFailed, WeightsMissing
from rollout.records import Generation, GenerationRequest

Judged = TypeVar("Judged")


async def hold_conversations(
    environment: Environment,
    prompts: Sequence[Prompt],
    *,
    session: GenerationSession,
    tokenizer: Any,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
    num_samples: int,
    request_prefix: str,
    judge: Callable[[Conversation], Awaitable[Judged]],
) -> list[Judged]:
    """`num_samples` judged conversations on every prompt, prompt by prompt.

    Args:
        environment: holds one conversation.
        prompts: what they begin with.
        session: the way to the servers.
        tokenizer, end_ids: of the policy.
        max_new_tokens: most tokens after a prompt.
        num_samples: conversations per prompt.
        request_prefix: the seed of an answer depends on this, on the place of the conversation and on the turn.
        judge: called with every conversation as soon as it has ended, while others go on. What it gives is returned.

    Raises:
        RolloutFailed, WeightsMissing: as the session.
        RuntimeError: the environment failed or returned no conversation of its model; names environment and prompt.
        What `judge` raises.
    """
    names = [f"{request_prefix}-{number}" for number in range(len(prompts)) for _ in range(num_samples)]  # of their requests
    exchange = _Exchange(session, num_conversations=len(names))

    async def hold(place: int) -> Judged:
        number, sample_index = divmod(place, num_samples)
        prompt = prompts[number]
        model = Model(
            prompt,
            tokenizer=tokenizer,
            end_ids=end_ids,
            max_new_tokens=max_new_tokens,
            request_id=names[place],
            sample_index=sample_index,
            ask=lambda request: exchange.ask(place, request),
        )
        try:
            conversation = await environment(prompt, model)
        except (RolloutFailed, WeightsMissing):
            raise
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            # By the environment itself. A task group would take it for an end that somebody wanted, and others would wait for ever.
            raise RuntimeError(f"environment {environment.name}: {prompt.prompt_id}: awaited a task that was cancelled") from error
        except Exception as error:  # a coroutine of the user's own may raise anything
            raise RuntimeError(f"environment {environment.name}: {prompt.prompt_id}: {type(error).__name__}: {error}") from error
        if not isinstance(conversation, Conversation):
            found = type(conversation).__name__
            raise RuntimeError(f"environment {environment.name}: {prompt.prompt_id}: returned a {found}, expected model.conversation(...)")
        exchange.end(place)
        session.end(names[place])
        return await judge(conversation)

    session.begin(names)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(exchange.run(tasks))
            held = [tasks.create_task(hold(place)) for place in range(len(names))]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
    return [conversation.result() for conversation in held]


class _Exchange:
    """Collects questions and hands out answers."""

    def __init__(self, session: GenerationSession, *, num_conversations: int) -> None:
        self._session = session
        self._together = session.settings.samples_per_call is None
        # Otherwise all at once: what environments do with answers then has one order, whatever the timing.
        self._as_they_arrive = not self._together or session.settings.is_rolling
        self._under_way = set(range(num_conversations))
        self._asked: list[tuple[int, GenerationRequest, asyncio.Future[Generation]]] = []
        self._changed = asyncio.Event()

    async def ask(self, place: int, request: GenerationRequest) -> Generation:
        answer: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._asked.append((place, request, answer))
        self._changed.set()
        return await answer

    def end(self, place: int) -> None:
        """The conversation at `place` asks nothing more."""
        self._under_way.remove(place)
        self._changed.set()

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Send questions until all conversations have ended."""
        while self._under_way:
            await self._changed.wait()
            self._changed.clear()
            # An environment may give up waiting, or end with a question that nobody awaits: such a question is not sent.
            self._asked = [question for question in self._asked if question[0] in self._under_way and not question[2].done()]
            if not self._asked or (self._together and {place for place, _, _ in self._asked} != self._under_way):
                continue
            asked, self._asked = sorted(self._asked, key=lambda question: (question[0], question[1].turn)), []
            if self._together:
                await self._send(asked)
            else:
                tasks.create_task(self._send(asked))

    async def _send(self, asked: Sequence[tuple[int, GenerationRequest, asyncio.Future[Generation]]]) -> None:
        answers = {request: answer for _, request, answer in asked}

        def arrived(request: GenerationRequest, generation: Generation) -> None:
            if not answers[request].done():  # the environment may have given up waiting
                answers[request].set_result(generation)

        generations = await self._session.generate(list(answers), on_generation=arrived if self._as_they_arrive else None)
        for answer, generation in zip(answers.values(), generations, strict=True):
            if not answer.done():
                answer.set_result(generation)
