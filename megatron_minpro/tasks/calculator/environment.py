"""The calculator: answers whenever the model ends with a question, until the model ends its turn."""

from __future__ import annotations

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.environments.model import Model
from megatron_minpro.tasks.arithmetic_chains.chains import CHAIN_END, EQUALS, OPERATIONS, STEP_END, apply_operation

CALL = CHAIN_END  # the word that ends a question

_MAX_DIGITS = 1000  # Python refuses to read integers of more than 4,300


async def calculator(prompt: Prompt, model: Model, *, modulus: int, max_calls: int = 16) -> Conversation:
    """A chain of arithmetic, with a calculator at hand.

    Args:
        prompt: the chain.
        model: the policy.
        modulus: of the chain.
        max_calls: a conversation with more questions is cut off.
    """
    call = model.encode(CALL)
    context, answers = prompt.token_ids, []
    while True:
        answer = await model(context, stop_token_ids=call)
        answers.append(answer)
        if answer.response_token_ids[-1:] != call:
            return model.conversation(*answers)
        context = answer.prompt_token_ids + answer.response_token_ids + model.encode(reply(model.text(answer), modulus=modulus))
        if len(answers) > max_calls or model.room(context) < 1:
            return model.conversation(*answers, finish_reason="length")


def reply(said: str, *, modulus: int) -> str:
    """What the calculator says to a text that ends with a question: `= result ;`, or `;` when it does not understand.

    Args:
        said: such as "3 + 4 = 7 ; 7 * 2 :".
        modulus: of the result.
    """
    match said.split()[-4:]:
        case [left, operation, right, word] if word == CALL and operation in OPERATIONS and _is_number(left) and _is_number(right):
            return f"{EQUALS} {apply_operation(int(left), operation, int(right), modulus=modulus)} {STEP_END}"
    return STEP_END


def _is_number(word: str) -> bool:
    return word.isdecimal() and len(word) <= _MAX_DIGITS
