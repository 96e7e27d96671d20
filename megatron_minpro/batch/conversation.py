"""What follows a prompt: the text that rewards read, and the tokens that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_minpro.batch.prompt import Prompt
from rollout.records import Generation, VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Text from one author, without special tokens."""

    author: Literal["model", "environment"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A finished conversation. An environment makes it, a reward judges it, and its tokens become one sample.

    The model may have answered several times. Every answer was given to all tokens before it, so the conversation is one sequence in
    which each answer's log-probs belong to its place: the tokens between two answers, of a tool or a user, are the part of the later
    answer's prompt that the earlier one did not have. Only the model's own tokens are trained.

    Raises ValueError when an answer was given to other tokens than those that stand before it.
    """

    prompt: Prompt
    turns: tuple[Turn, ...]  # after the prompt, in order
    text: str  # of all turns as one
    finish_reason: str  # of the model's last answer: stop | length
    num_response_tokens: int  # that the model wrote
    generations: tuple[Generation, ...]  # the model's answers; () where only the text was kept
    closing_token_ids: tuple[int, ...] = ()  # what the environment said after the model's last answer

    def __post_init__(self) -> None:
        before: tuple[int, ...] = ()
        for number, generation in enumerate(self.generations):
            if generation.prompt_token_ids[: len(before)] != before:
                at = next(t for t, token_id in enumerate(before) if generation.prompt_token_ids[t : t + 1] != (token_id,))
                raise ValueError(
                    f"{self.prompt.prompt_id}: answer {number} of the model was given to other tokens than the conversation holds before "
                    f"it (token {at} differs); an environment extends the tokens of the answer before and changes none"
                )
            before = generation.prompt_token_ids + generation.response_token_ids

    @classmethod
    def of_text(cls, prompt: Prompt, text: str, *, finish_reason: str, num_response_tokens: int) -> Conversation:
        """One answer of which only the text is known: enough for a reward, not for training."""
        return cls(
            prompt=prompt,
            turns=(Turn(author="model", text=text),),
            text=text,
            finish_reason=finish_reason,
            num_response_tokens=num_response_tokens,
            generations=(),
        )

    @property
    def response(self) -> str:
        """The text of the model's last answer."""
        return next((turn.text for turn in reversed(self.turns) if turn.author == "model"), "")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens, the prompt's included."""
        last = self.generations[-1]
        return last.prompt_token_ids + last.response_token_ids + self.closing_token_ids

    @property
    def loss_mask(self) -> list[bool]:
        """For every token whether the model wrote it."""
        mask = [False] * len(self.token_ids)
        for generation in self.generations:
            start = len(generation.prompt_token_ids)
            mask[start : start + len(generation.response_token_ids)] = [True] * len(generation.response_token_ids)
        return mask

    @property
    def engine_logprobs(self) -> list[float]:
        """Log-probs of the model's tokens, as the server scored them."""
        return [logprob for generation in self.generations for logprob in generation.engine_logprobs]

    @property
    def version_spans(self) -> tuple[VersionSpan, ...]:
        """Policy versions of the model's tokens; start and end count these alone."""
        return joined_spans([generation.version_spans for generation in self.generations])


def joined_spans(parts: Sequence[Sequence[VersionSpan]]) -> tuple[VersionSpan, ...]:
    """Spans of consecutive runs of tokens as spans of all of them; neighbours of one version become one span."""
    joined: list[VersionSpan] = []
    for spans in parts:
        begin = joined[-1].end if joined else 0
        for span in spans:
            if joined and joined[-1].policy_version == span.policy_version:
                joined[-1] = VersionSpan(policy_version=span.policy_version, start=joined[-1].start, end=begin + span.end)
            else:
                joined.append(VersionSpan(policy_version=span.policy_version, start=begin + span.start, end=begin + span.end))
    return tuple(joined)
