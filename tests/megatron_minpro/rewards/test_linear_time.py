"""What looks at a response in the process that trains takes time in proportion to its length, whatever it holds."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from megatron_minpro.rewards.answers import as_integer, as_number, compare_plainly, extract_answer, for_math_verify, last_boxed

# One unit of text each; repeated, it is what a policy that has lost its way writes, or what makes a regular expression backtrack.
UNITS = {
    "digits": "7",
    "digits behind a mark": "Answer: 7",
    "spaces": " ",
    "spaces and digits": "7          ",
    "marks": "Answer:",
    "marks and stars": "Answer ** : **",
    "lines": "\n",
    "rules": "---\n",
    "opened boxes": "\\boxed{",
    "boxes": "\\boxed{7} and ",
    "braces": "{",
    "brace pairs": "{}",
    "backslashes": "\\",
    "dollars": "$",
    "double dollars": "$$\n",
    "fences": "```\n",
    "groups": "1,234",
    "commas": "7,",
    "points": ".7",
    "exponents": "7e",
    "primes": "^{\\prime \\prime ",
    "subscripts": "_{a}",
    "carets": "^ ",
    "stars": "*",
    "environments": "\\begin{align}",
    "begun answers": "answer ",
}
LOOKS: dict[str, Callable[[str], object]] = {
    "dapo": lambda text: extract_answer(text, style="dapo", truncated=False, label="7"),
    "dapo, one long answer": lambda text: extract_answer("Answer: " + text, style="dapo", truncated=True, label="7, 8"),
    "boxed": lambda text: extract_answer(text, style="boxed", truncated=False, label="7"),
    "several boxes": lambda text: extract_answer(text, style="boxed", truncated=False, label="7, 8"),
    "last_boxed": last_boxed,
    "compare_plainly": lambda text: compare_plainly("7", text),
    "compare with a formula": lambda text: compare_plainly("x^{\\prime}+1", text),
    "as_integer": as_integer,
    "as_number": as_number,
    "for_math_verify": for_math_verify,
}
LENGTH, TIMES = 5_000, 8


def seconds(look: Callable[[str], object], text: str) -> float:
    """CPU time, the best of two: the machine may be busy."""
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        look(text)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("name", LOOKS)
def test_eight_times_the_text_takes_about_eight_times_as_long(name: str) -> None:
    slow = {}
    for kind, unit in UNITS.items():
        text = (unit * (LENGTH // len(unit) + 1))[:LENGTH]
        short = seconds(LOOKS[name], text)
        long = seconds(LOOKS[name], (unit * (TIMES * LENGTH // len(unit) + 1))[: TIMES * LENGTH])
        if long > 3 * TIMES * short and long > 0.02:  # quadratic: 64 times as long
            slow[kind] = (short, long)
    assert slow == {}


def test_a_million_digits_are_wrong_within_seconds_without_a_worker() -> None:
    digits = "7" * 1_000_000
    start = time.process_time()
    for style, response in (("dapo", f"Answer: {digits}"), ("boxed", f"\\boxed{{{digits}}}")):
        answer = extract_answer(response, style=style, truncated=False, label="7")  # type: ignore[arg-type]
        assert answer == digits
        assert compare_plainly("7", answer) is False
        assert compare_plainly(digits, answer) is True
    assert time.process_time() - start < 5
