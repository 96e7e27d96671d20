"""Prompts and the cursor that deals them out: what is asked, in which order, and where a resumed run continues."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron_minpro.batch.prompt import Message, Prompt


@runtime_checkable
class PromptSource(Protocol):
    """A finite, indexable set of prompts. The same index gives the same prompt in every process.

    `digests` says what the prompts are: a hash for each part that can change, such as "questions", "labels" and "token_ids". A resumed
    run compares them, so equal digests must mean equal prompts. A generator hashes its options instead of all its prompts.
    """

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Prompt: ...

    def digests(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptList:
    """Prompts held in memory, e.g. those of a file."""

    name: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def digests(self) -> Mapping[str, str]:
        """See PromptSource."""
        return {
            "questions": digest(prompt.text for prompt in self.prompts),
            "labels": digest(prompt.answer for prompt in self.prompts),
            "token_ids": digest(prompt.token_ids for prompt in self.prompts),
            "rows": digest(prompt.row for prompt in self.prompts),  # environments and rewards may read any field
        }


def digest(values: Iterable[Any]) -> str:
    """16 hexadecimal digits that depend on every value and on their order. values: JSON types, or what Python can show, as dates."""
    state = hashlib.sha256()
    for value in values:
        state.update(json.dumps(value, default=repr, sort_keys=True).encode() + b"\n")
    return state.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What became of the rows of a source. rows = empty + duplicate_rows + conflicting + too_long + kept."""

    source: str
    rows: int  # as read
    empty: int  # rows without a question or without an answer
    wrapped: int  # rows whose question came with a wrapper around it, which was taken off
    duplicate_rows: int  # further rows of a question already seen (differences of white space ignored)
    conflicting: int  # distinct questions whose rows disagree on the answer; all of their rows are dropped
    too_long: int  # distinct questions whose templated prompt exceeds max_prompt_tokens
    max_prompt_tokens: int
    kept: int

    @property
    def distinct(self) -> int:
        """Distinct questions that have an answer, before conflicts and length are looked at."""
        return self.rows - self.empty - self.duplicate_rows

    def summary(self) -> str:
        """One line for the log."""
        unwrapped = f"{self.wrapped:,} rows came with a wrapper, which was taken off; " if self.wrapped else ""
        return (
            f"{self.source}: {self.kept:,} prompts from {self.rows:,} rows, {self.distinct:,} distinct questions "
            f"({unwrapped}{self.duplicate_rows:,} duplicate rows merged; dropped: {self.empty:,} empty rows, "
            f"{self.conflicting:,} questions whose rows disagree on the answer, "
            f"{self.too_long:,} longer than {self.max_prompt_tokens:,} tokens)"
        )


class PromptCursor:
    """Deals prompts in an order shuffled anew for every epoch; its state is a small JSON object.

    Within an epoch every prompt comes exactly once. A batch that reaches the end of an epoch is filled from the next one, so
    nothing is skipped; such a batch may therefore hold one prompt twice (tell groups apart by their place, not by prompt_id).
    """

    def __init__(self, source: PromptSource, seed: int) -> None:
        """Raises ValueError when the source is empty."""
        if len(source) == 0:
            raise ValueError(f"prompt source {source.name!r} is empty")
        self._source = source
        self._digests = dict(source.digests())  # once: a state is taken before every batch
        self._seed = seed
        self._position = 0
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Passes completed."""
        return self._epoch

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next num_prompts prompts. Raises ValueError when num_prompts is not positive."""
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        prompts = []
        for _ in range(num_prompts):
            prompts.append(self._source[self._order[self._position]])
            self._position += 1
            if self._position == len(self._order):
                self._position = 0
                self._start_epoch(self._epoch + 1)
        return prompts

    def examples(self, num_prompts: int) -> list[Prompt]:
        """The first prompts of the source, at most num_prompts. Deals nothing out."""
        return [self._source[index] for index in range(min(num_prompts, len(self._source)))]

    def state(self) -> dict[str, Any]:
        """Everything load_state needs, as JSON types."""
        return {
            **self._identity(),
            "digests": self._digests,
            "epoch": self._epoch,
            "position": self._position,
            "next_prompt_id": self._next_prompt_id(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state was taken on other prompts, naming the part that changed, or with another seed.
        """
        expected = {"source", "seed", "num_prompts", "digests", "epoch", "position", "next_prompt_id"}
        if set(state) != expected:
            raise ValueError(f"prompt cursor state has the keys {sorted(state)}, expected {sorted(expected)}")
        for key, here in self._identity().items():
            if state[key] != here:
                raise ValueError(f"prompt cursor: the saved state has {key} = {state[key]!r}, this run has {here!r}")
        # The size may agree while the rows do not: other labels, other questions, another chat template.
        changed = sorted(part for part in {*state["digests"], *self._digests} if state["digests"].get(part) != self._digests.get(part))
        if changed:
            raise ValueError(
                f"prompt cursor: the {' and '.join(changed)} of source {self._source.name!r} have changed since the run was saved; "
                "expected the same data set and tokenizer, or a new name=..."
            )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self._source):
            raise ValueError(f"prompt cursor: epoch {epoch}, position {position} lie outside a source of {len(self._source)} prompts")
        self._position = position
        self._start_epoch(epoch)
        if self._next_prompt_id() != state["next_prompt_id"]:
            raise ValueError(
                f"prompt cursor: the saved state continues with prompt {state['next_prompt_id']!r}, "
                f"this source has {self._next_prompt_id()!r} there; the prompts have changed"
            )

    def _identity(self) -> dict[str, Any]:
        return {"source": self._source.name, "seed": self._seed, "num_prompts": len(self._source)}

    def _next_prompt_id(self) -> str:
        return self._source[self._order[self._position]].prompt_id

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = list(range(len(self._source)))
        random.Random(f"prompt order, seed {self._seed}, epoch {epoch}").shuffle(self._order)


def encode_prompts(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of conversations that begin with these user messages; see `encode_conversations`."""
    return encode_conversations(tokenizer, [[{"role": "user", "content": text}] for text in texts])


def encode_conversations(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[tuple[int, ...]]:
    """Token ids of conversations under the tokenizer's own chat template, generation prompt added.

    Args:
        tokenizer: a transformers tokenizer with a chat template. Options of the template (such as Qwen3's enable_thinking) keep the
            template's defaults.
        conversations: messages with role and content, the last one being the user's.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no chat template; prompts are built with it")
    if not conversations:
        return []
    rendered = tokenizer.apply_chat_template([list(messages) for messages in conversations], tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already; one batch call uses the tokenizer's threads.
    return [tuple(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
