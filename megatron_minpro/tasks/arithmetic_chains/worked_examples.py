"""Worked examples for supervised learning: written-out solutions, some of them wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from megatron_minpro.data.prompts import PromptSource
from megatron_minpro.tasks.arithmetic_chains.chains import EQUALS, OPERATIONS, STEP_END, Chain, apply_operation
from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains

# (left, operation, right) -> (probability of an error, favourite mistake)
ErrorTable = dict[tuple[int, str, int], tuple[float, int]]


def noisy_solutions(
    prompts: PromptSource,
    seed: int,
    *,
    hard_entries: float = 0.30,
    hard_error: float = 0.50,
    easy_error: float = 0.02,
    lazy: float = 0.05,
    garble: float = 0.03,
    favourite_share: float = 0.60,
    table_seed: int = 777,
) -> Iterator[tuple[str, str]]:
    """Prompt and response texts without end, on the chains of the train split. Example i is a fixed function of the arguments and of i.

    When the chains have all come, they come again with other mistakes. The defaults leave a model of 100k parameters at a pass@1 of about
    0.3.

    Args:
        prompts: the training prompts, an ArithmeticChains.
        seed: of the mistakes.
        hard_entries: share of the entries (left, operation, right) that are often wrong.
        hard_error: probability of a wrong result on such an entry.
        easy_error: probability of a slip elsewhere.
        lazy: probability that the writer stops early and guesses the result.
        garble: probability per step of a dropped word or a repeated step, half each.
        favourite_share: of the wrong results: share that is the entry's one favourite mistake.
        table_seed: which entries are hard, and what the favourite mistakes are.

    Raises:
        ValueError: other prompts, or a number that is no probability.
    """
    if not isinstance(prompts, ArithmeticChains):
        raise ValueError(f"writes solutions of arithmetic chains; expected prompts of that task, found {prompts.name}")
    probabilities = {
        "hard_entries": hard_entries,
        "hard_error": hard_error,
        "easy_error": easy_error,
        "lazy": lazy,
        "garble": garble,
        "favourite_share": favourite_share,
    }
    for name, value in probabilities.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} = {value}, expected a probability")
    errors = _error_table(
        prompts.chain(0).modulus, hard_entries=hard_entries, hard_error=hard_error, easy_error=easy_error, table_seed=table_seed
    )

    def examples() -> Iterator[tuple[str, str]]:
        for index in itertools.count():
            chain = prompts.chain(index % len(prompts))
            dice = random.Random(f"worked example {seed}/{index}")
            yield chain.text, _write(chain, dice, errors, lazy=lazy, garble=garble, favourite_share=favourite_share)

    return examples()


def _error_table(modulus: int, *, hard_entries: float, hard_error: float, easy_error: float, table_seed: int) -> ErrorTable:
    table = random.Random(f"error table {table_seed}")
    errors: ErrorTable = {}
    for operation in OPERATIONS:
        for left in range(modulus):
            for right in range(modulus):
                hard = table.random() < hard_entries
                true = apply_operation(left, operation, right, modulus=modulus)
                mistake = (true + table.randrange(1, modulus)) % modulus
                errors[left, operation, right] = (hard_error if hard else easy_error, mistake)
    return errors


def _write(chain: Chain, dice: random.Random, errors: ErrorTable, *, lazy: float, garble: float, favourite_share: float) -> str:
    modulus = chain.modulus
    steps = len(chain.operations)
    guess_at = dice.randrange(max(1, steps - 1)) if dice.random() < lazy else steps
    words: list[str] = []
    state = chain.values[0]
    for step, (operation, right) in enumerate(zip(chain.operations, chain.values[1:], strict=True)):
        if step == guess_at:
            words += [EQUALS, str(dice.randrange(modulus)), STEP_END]
            break
        probability, favourite = errors[state, operation, right]
        if dice.random() >= probability:
            result = apply_operation(state, operation, right, modulus=modulus)
        else:
            result = favourite if dice.random() < favourite_share else dice.randrange(modulus)
        written = [str(state), operation, str(right), EQUALS, str(result), STEP_END]
        draw = dice.random()
        if draw < garble / 2:
            written.pop(dice.randrange(4))
        elif draw < garble:
            written = written * 2
        words += written
        state = result
    return " ".join(words)
