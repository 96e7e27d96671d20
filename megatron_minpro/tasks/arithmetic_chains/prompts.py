"""Chains as prompts. All chains of a given size are numbered.

A fixed permutation of the numbers sets one chain in sixteen apart as held out, whatever the seed; the seed only orders the chains inside
a split. So a held-out chain never occurs in training, and no chain occurs twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.data.prompts import digest, encode_prompts
from megatron_minpro.tasks.arithmetic_chains.chains import OPERATIONS, Chain, words

_HELD_OUT_ONE_IN = 16
_DIGESTED_PROMPTS = 32


class ArithmeticChains:
    """A PromptSource of chains: index -> chain is a fixed function of the options, and one-to-one."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_operations: int,
        modulus: int,
        size: int,
        seed: int,
        split: Literal["train", "held_out"],
    ) -> None:
        """size: number of prompts.

        Raises ValueError for options out of range, a size beyond the split's chains, and words the tokenizer does not know.
        """
        if num_operations < 1:
            raise ValueError(f"arithmetic_chains: num_operations must be at least 1, got {num_operations}")
        if modulus < 2:
            raise ValueError(f"arithmetic_chains: modulus must be at least 2, got {modulus}")
        if split not in ("train", "held_out"):
            raise ValueError(f"arithmetic_chains: split = {split!r}, expected 'train' or 'held_out'")
        self._num_operations, self._modulus, self._seed, self._split = num_operations, modulus, seed, split
        self._num_chains = modulus ** (num_operations + 1) * len(OPERATIONS) ** num_operations
        held_out = max(1, self._num_chains // _HELD_OUT_ONE_IN)
        # Places 0 .. held_out-1 of the fixed permutation are the held-out split.
        self._first = 0 if split == "held_out" else held_out
        self._available = held_out if split == "held_out" else self._num_chains - held_out
        if not 1 <= size <= self._available:
            raise ValueError(f"arithmetic_chains: size = {size}, but the {split} split has 1 to {self._available} chains of this kind")
        self._size = size
        self._tokenizer = tokenizer
        for word in words(modulus):
            ids = tokenizer(word, add_special_tokens=False)["input_ids"]
            if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
                raise ValueError(f"arithmetic_chains: the tokenizer {tokenizer.name_or_path!r} does not know {word!r} (modulus {modulus})")

    @property
    def name(self) -> str:
        kind = f"{self._num_operations}x{self._modulus}"
        return f"arithmetic_chains-{kind}-{self._split}-{self._seed}"

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts([index])[0]

    def digests(self) -> dict[str, str]:
        """See PromptSource. The options determine all chains and answers; some prompts show the chat template and the tokenizer."""
        options = (self._num_operations, self._modulus, self._size, self._seed, self._split)
        some = self.prompts(range(min(_DIGESTED_PROMPTS, self._size)))
        return {"options": digest([options]), "token_ids": digest(prompt.token_ids for prompt in some)}

    def prompts(self, indices: Sequence[int]) -> list[Prompt]:
        """Several prompts at once: much quicker than one at a time."""
        numbers = [self._number(index) for index in indices]
        chains = [self._decode(number) for number in numbers]
        token_ids = encode_prompts(self._tokenizer, [chain.text for chain in chains])
        kind = f"{self._num_operations}x{self._modulus}"
        return [
            Prompt(prompt_id=f"chain-{kind}-{number}", text=chain.text, token_ids=ids, answer=str(chain.result), source=self.name)
            for number, chain, ids in zip(numbers, chains, token_ids, strict=True)
        ]

    def chain(self, index: int) -> Chain:
        """The chain behind prompt `index`. Raises IndexError outside 0..len-1."""
        return self._decode(self._number(index))

    def _number(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(f"prompt {index} of {self._size}")
        kind = f"{self._num_operations}x{self._modulus}"
        place = self._first + permuted(index, size=self._available, key=f"{kind} {self._split} seed {self._seed}")
        return permuted(place, size=self._num_chains, key=f"{kind} held-out split")  # the same for every seed

    def _decode(self, number: int) -> Chain:
        """Mixed radix: num_operations + 1 digits of base modulus, then num_operations of base 3."""
        values, operations = [], []
        for _ in range(self._num_operations + 1):
            number, value = divmod(number, self._modulus)
            values.append(value)
        for _ in range(self._num_operations):
            number, operation = divmod(number, len(OPERATIONS))
            operations.append(OPERATIONS[operation])
        return Chain(values=tuple(values), operations=tuple(operations), modulus=self._modulus)


def permuted(index: int, *, size: int, key: str) -> int:
    """The place of `index` under a pseudo-random permutation of range(size) chosen by key, in constant memory.

    A four-round Feistel network on the next even number of bits, walked until it lands inside the range (Black and Rogaway, 2002).
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(4):
            digest = hashlib.blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = (left << half_bits) | right
        if index < size:
            return index
