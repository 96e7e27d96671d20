"""A small verifiable task that a model of 100k parameters learns within minutes.

A chain is a list of operations (+, -, *) folded from the left, modulo a small number. The prompt lists it, `3 + 4 * 2 - 5 :`, and the
response writes one step per operation, `3 + 4 = 7 ; 7 * 2 = 4 ; 4 - 5 = 9 ;`. The last result is the answer; a blind guess is right
once in `modulus` times.

All chains of a given size are numbered. A fixed permutation of the numbers sets one chain in sixteen apart as held out, whatever the
seed; the seed only orders the chains inside a split. So a held-out chain never occurs in training, and no chain occurs twice.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.data.prompts import digest, encode_prompts

OPERATIONS = ("+", "-", "*")
EQUALS, STEP_END, CHAIN_END = "=", ";", ":"
END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN = "<|end|>", "<|pad|>", "<|unknown|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message['role'] }}|> {{ message['content'] }}"
    "{%- if message['role'] == 'assistant' %} <|end|>{% endif %} {% endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
_HELD_OUT_ONE_IN = 16
_DIGESTED_PROMPTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """values[0] operations[0] values[1] operations[1] ... values[-1], folded from the left modulo `modulus`."""

    values: tuple[int, ...]  # one more than operations
    operations: tuple[str, ...]
    modulus: int

    @property
    def text(self) -> str:
        words = [str(self.values[0])]
        for operation, value in zip(self.operations, self.values[1:], strict=True):
            words += [operation, str(value)]
        return " ".join([*words, CHAIN_END])

    @property
    def result(self) -> int:
        state = self.values[0]
        for operation, value in zip(self.operations, self.values[1:], strict=True):
            state = apply_operation(state, operation, value, modulus=self.modulus)
        return state


def apply_operation(left: int, operation: str, right: int, *, modulus: int) -> int:
    """One step of a chain, in 0..modulus-1."""
    match operation:
        case "+":
            return (left + right) % modulus
        case "-":
            return (left - right) % modulus
        case "*":
            return (left * right) % modulus
    raise ValueError(f"operation {operation!r} is not one of {', '.join(OPERATIONS)}")


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
        words = [*map(str, range(modulus)), *OPERATIONS, EQUALS, STEP_END, CHAIN_END]
        for word in words:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkedExampleNoise:
    """How wrong the worked examples are. The defaults leave a model of 100k parameters at a pass@1 of about 0.3."""

    hard_entries: float = 0.30  # share of the entries (left, operation, right) that are often wrong
    hard_error: float = 0.50  # probability of a wrong result on such an entry
    easy_error: float = 0.02  # probability of a slip elsewhere
    lazy: float = 0.05  # probability that the writer stops early and guesses the result
    garble: float = 0.03  # probability per step of a dropped word or a repeated step, half each
    favourite_share: float = 0.60  # of the wrong results: share that is the entry's one favourite mistake
    table_seed: int = 777  # which entries are hard, and what the favourite mistakes are

    def __post_init__(self) -> None:
        for key in ("hard_entries", "hard_error", "easy_error", "lazy", "garble", "favourite_share"):
            value = getattr(self, key)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"worked example noise: {key} = {value}, expected a probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkedExample:
    """A prompt with a written-out, sometimes wrong, solution for supervised learning."""

    prompt: Prompt
    response: str
    response_token_ids: tuple[int, ...]  # the end token included


class WorkedExamples:
    """Noisy worked examples on the chains of a source (use its train split). Example i is a fixed function of source, noise, seed and i.

    Indices may run past the source: the chains then come again, with other noise.
    """

    def __init__(self, chains: ArithmeticChains, tokenizer: Any, *, noise: WorkedExampleNoise, seed: int) -> None:
        """Raises ValueError when the tokenizer has no end-of-sequence token."""
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
        self._chains, self._tokenizer, self._noise, self._seed = chains, tokenizer, noise, seed
        self._modulus = chains.chain(0).modulus
        table = random.Random(f"error table {noise.table_seed}")
        self._errors: dict[tuple[int, str, int], tuple[float, int]] = {}  # entry -> (probability of an error, favourite mistake)
        for operation in OPERATIONS:
            for left in range(self._modulus):
                for right in range(self._modulus):
                    hard = table.random() < noise.hard_entries
                    true = apply_operation(left, operation, right, modulus=self._modulus)
                    mistake = (true + table.randrange(1, self._modulus)) % self._modulus
                    self._errors[left, operation, right] = (noise.hard_error if hard else noise.easy_error, mistake)

    def batch(self, start: int, count: int) -> list[WorkedExample]:
        """Examples start .. start + count - 1."""
        indices = range(start, start + count)
        prompts = self._chains.prompts([index % len(self._chains) for index in indices])
        responses = [self._write(index) for index in indices]
        encoded = self._tokenizer(responses, add_special_tokens=False)["input_ids"]
        return [
            WorkedExample(prompt=prompt, response=response, response_token_ids=(*ids, self._tokenizer.eos_token_id))
            for prompt, response, ids in zip(prompts, responses, encoded, strict=True)
        ]

    def _write(self, index: int) -> str:
        chain = self._chains.chain(index % len(self._chains))
        noise, modulus = self._noise, self._modulus
        dice = random.Random(f"worked example {self._seed}/{index}")
        steps = len(chain.operations)
        guess_at = dice.randrange(max(1, steps - 1)) if dice.random() < noise.lazy else steps
        words: list[str] = []
        state = chain.values[0]
        for step, (operation, right) in enumerate(zip(chain.operations, chain.values[1:], strict=True)):
            if step == guess_at:
                words += [EQUALS, str(dice.randrange(modulus)), STEP_END]
                break
            probability, favourite = self._errors[state, operation, right]
            if dice.random() >= probability:
                result = apply_operation(state, operation, right, modulus=modulus)
            else:
                result = favourite if dice.random() < noise.favourite_share else dice.randrange(modulus)
            written = [str(state), operation, str(right), EQUALS, str(result), STEP_END]
            draw = dice.random()
            if draw < noise.garble / 2:
                written.pop(dice.randrange(4))
            elif draw < noise.garble:
                written = written * 2
            words += written
            state = result
        return " ".join(words)


def build_tokenizer(directory: Path, *, modulus: int = 10) -> Any:
    """Make the task's own tokenizer, one token per word, and save it where transformers and SGLang load it.

    directory: gets tokenizer.json and tokenizer_config.json (chat template inside); made if absent. Returns the transformers tokenizer.
    The vocabulary is padded with reserved tokens to a multiple of 8 (24 tokens for modulus 10) so that it divides over ranks.
    """
    import transformers  # here: seconds to import, needed once per base model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = [*map(str, range(modulus)), *OPERATIONS, EQUALS, STEP_END, CHAIN_END]
    special = [PAD_TOKEN, UNKNOWN_TOKEN, END_TOKEN, *ROLE_TOKENS]
    special += [f"<|reserved_{number}|>" for number in range(-(len(words) + len(special)) % 8)]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate([*words, *special])}, unk_token=UNKNOWN_TOKEN))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[word for word in special if word not in (PAD_TOKEN, UNKNOWN_TOKEN, END_TOKEN)],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer
