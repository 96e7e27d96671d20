"""The policy as one conversation sees it: tokens in, tokens with log-probs out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from megatron_minpro.batch.conversation import Conversation, Turn
from megatron_minpro.batch.prompt import Message, Prompt
from megatron_minpro.data.chat_template import text_behind_an_answer
from megatron_minpro.data.end_tokens import response_text
from megatron_minpro.data.prompts import encode_conversations
from rollout.records import FinishReason, Generation, GenerationRequest

Ask = Callable[[GenerationRequest], Awaitable[Generation]]


class Model:
    """What an environment is given. `await model(token_ids)` is one answer; `model.conversation(...)` is what an environment returns.

    A conversation has at most `prompt tokens + max_new_tokens` tokens, tools' and users' included: it is trained as one sequence.
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        tokenizer: Any,
        end_ids: tuple[int, ...],
        max_new_tokens: int,
        request_id: str,
        sample_index: int,
        ask: Ask,
    ) -> None:
        """
        Args:
            prompt: what the conversation begins with.
            tokenizer: the transformers tokenizer of the policy.
            end_ids: tokens that end an answer.
            max_new_tokens: most tokens after the prompt.
            request_id, sample_index: the conversation's name among those of a batch; its answers' seeds depend on it.
            ask: gets one answer from the servers.
        """
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self._prompt = prompt
        self._most_tokens = len(prompt.token_ids) + max_new_tokens
        self._request_id, self._sample_index = request_id, sample_index
        self._ask = ask
        self._num_asked = 0
        self._answers: list[Generation] = []

    async def __call__(self, context: Sequence[int] | Sequence[Message], *, stop_token_ids: Sequence[int] = ()) -> Generation:
        """One answer of the policy: its tokens, the server's log-probs and the policy versions that wrote them.

        Args:
            context: all tokens before the answer; or messages, which the chat template makes tokens of. The second and later answers of
                a conversation are given to the tokens of the one before, followed by new ones (see `follow_up`).
            stop_token_ids: tokens that end this answer, beside the model's own.

        Raises:
            ValueError: the conversation has no place for another token (ask `room` first), or the context is of another kind.
        """
        token_ids = _token_ids(self.tokenizer, context)
        room = self.room(token_ids)
        if room < 1:
            raise ValueError(f"{self._prompt.prompt_id}: the context has {len(token_ids)} tokens, and {self._most_tokens} are allowed")
        request = GenerationRequest(
            request_id=self._request_id,
            sample_index=self._sample_index,
            turn=self._num_asked,
            prompt_token_ids=token_ids,
            max_new_tokens=room,
            stop_token_ids=tuple(stop_token_ids),
        )
        self._num_asked += 1  # before the wait: several questions may be under way, and each has its own seed
        answer = await self._ask(request)
        self._answers.append(answer)
        return answer

    def room(self, token_ids: Sequence[int]) -> int:
        """How many tokens the model may still write behind these."""
        return self._most_tokens - len(token_ids)

    def text(self, answer: Generation) -> str:
        """An answer without its end token and without special tokens."""
        return response_text(self.tokenizer, answer.response_token_ids, end_ids=self.end_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without the chat template."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def follow_up(self, answer: Generation, messages: Sequence[Message]) -> tuple[int, ...]:
        """The context of the next answer: all tokens so far, and what the chat template writes for these messages.

        Args:
            answer: the model's last one. Its tokens are kept as they are: text that is encoded again may give others.
            messages: what the environment says, such as {"role": "tool", "content": "7"}.
        """
        behind = self.encode(text_behind_an_answer(self.tokenizer, messages, generation_prompt=True))
        before = answer.prompt_token_ids + answer.response_token_ids
        return before + (behind[1:] if behind[:1] == before[-1:] else behind)  # the answer may have ended with the template's own token

    def conversation(self, *answers: Generation, closing: Sequence[int] = (), finish_reason: FinishReason | None = None) -> Conversation:
        """What an environment returns.

        Args:
            answers: of this model, in order. Only their tokens are trained.
            closing: tokens that the environment writes behind the last answer.
            finish_reason: "length" when the conversation was cut off; None: what the last answer says.

        Raises:
            ValueError: no answer, one that this model did not give, one given to other tokens than the conversation holds before it, or
                more tokens than a conversation may have.
        """
        name = self._prompt.prompt_id
        if not answers:
            raise ValueError(f"{name}: a conversation without an answer of the model; there is nothing to train")
        if not {id(answer) for answer in answers} <= {id(answer) for answer in self._answers}:
            raise ValueError(f"{name}: a conversation with an answer that the model did not give; its log-probs belong to no policy")
        conversation = Conversation(
            prompt=self._prompt,
            turns=tuple(self._turns(answers, tuple(closing))),
            text=self._whole_text(answers, tuple(closing)),
            finish_reason=answers[-1].finish_reason if finish_reason is None else finish_reason,
            num_response_tokens=sum(len(answer.response_token_ids) for answer in answers),
            generations=answers,
            closing_token_ids=tuple(closing),
        )
        if self.room(conversation.token_ids) < 0:
            raise ValueError(f"{name}: a conversation of {len(conversation.token_ids)} tokens, and {self._most_tokens} are allowed")
        return conversation

    def _turns(self, answers: Sequence[Generation], closing: tuple[int, ...]) -> list[Turn]:
        turns: list[Turn] = []
        for number, answer in enumerate(answers):
            if number:
                before = answers[number - 1]
                said = answer.prompt_token_ids[len(before.prompt_token_ids) + len(before.response_token_ids) :]
                turns.append(Turn(author="environment", text=self._decode(said)))
            turns.append(Turn(author="model", text=self.text(answer)))
        if closing:
            turns.append(Turn(author="environment", text=self._decode(closing)))
        return turns

    def _whole_text(self, answers: Sequence[Generation], closing: tuple[int, ...]) -> str:
        start, last = len(answers[0].prompt_token_ids), answers[-1]
        if len(answers) == 1 and not closing:
            return self.text(last)
        return self._decode((last.prompt_token_ids + last.response_token_ids + closing)[start:])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)


def _token_ids(tokenizer: Any, context: Sequence[int] | Sequence[Message]) -> tuple[int, ...]:
    token_ids = [int(entry) for entry in context if isinstance(entry, Integral)]  # NumPy's too
    if len(token_ids) == len(context):
        return tuple(token_ids)
    messages = [entry for entry in context if isinstance(entry, Mapping)]
    if len(messages) != len(context):
        kinds = sorted({type(entry).__name__ for entry in context})
        raise ValueError(f"the context holds {' and '.join(kinds)}, expected token ids (whole numbers) or messages")
    [encoded] = encode_conversations(tokenizer, [messages])
    return encoded
