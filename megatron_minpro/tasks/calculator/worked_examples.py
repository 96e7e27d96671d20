"""Worked examples in which some steps ask the calculator and the others are often wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from megatron_minpro.data.prompts import PromptSource
from megatron_minpro.tasks.arithmetic_chains.chains import EQUALS, STEP_END, apply_operation
from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains
from megatron_minpro.tasks.calculator.environment import CALL


def steps_and_calls(prompts: PromptSource, seed: int, *, calls: float = 0.4, errors: float = 0.5) -> Iterator[tuple[str, str]]:
    """Prompt and response texts without end. Example i is a fixed function of the arguments and of i.

    Args:
        prompts: an ArithmeticChains.
        seed: of the dice.
        calls: probability that a step asks the calculator, whose results are right.
        errors: probability that the result of any other step is drawn at random.

    Raises:
        ValueError: other prompts, or a number that is no probability.
    """
    if not isinstance(prompts, ArithmeticChains):
        raise ValueError(f"writes solutions of arithmetic chains; expected prompts of that task, found {prompts.name}")
    for name, value in (("calls", calls), ("errors", errors)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} = {value}, expected a probability")

    def write(index: int) -> tuple[str, str]:
        chain = prompts.chain(index % len(prompts))
        dice = random.Random(f"calculator example {seed}/{index}")
        words: list[str] = []
        state = chain.values[0]
        for operation, right in zip(chain.operations, chain.values[1:], strict=True):
            result = apply_operation(state, operation, right, modulus=chain.modulus)
            asks = dice.random() < calls
            if not asks and dice.random() < errors:
                result = dice.randrange(chain.modulus)
            words += [str(state), operation, str(right), *([CALL] if asks else []), EQUALS, str(result), STEP_END]
            state = result
        return chain.text, " ".join(words)

    return map(write, itertools.count())
