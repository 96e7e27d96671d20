"""The process that runs math-verify: one JSON request per line on stdin, one JSON reply per line on stdout.

It may hang or die on a hostile expression; grader_pool.py, which started it, then kills and replaces it. Run by file path, so it imports
nothing of this package.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

# math-verify compares through floats of 15 digits in places; integers at least this large are compared exactly instead.
_EXACT_FROM = 10**15
# It rounds to 6 decimals: numbers below the first value are compared to the second, as a part of the label, instead.
_SMALL_BELOW, _SMALL_RELATIVE = 1e-3, 1e-4


def equal_answers(label: str, answer: str, *, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether an answer states the same mathematical object as the label, or a number as near to it as the two tolerances allow.

    relative: times the label's size. Raises ValueError for a label nobody can read.
    """
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    # No time limit here: math-verify's own cannot interrupt C code; the parent's clock is the only one.
    # LaTeX alone: where that cannot be read, math-verify would otherwise take the last number in the text for the answer.
    reading = [LatexExtractionConfig()]
    expected = parse(_as_math(label), extraction_config=reading, parsing_timeout=None)
    found = parse(_as_math(answer), extraction_config=reading, parsing_timeout=None)
    if not expected:
        raise ValueError(f"label {label!r} is not readable mathematics")
    wanted, given = _as_number(expected), _as_number(found)
    distance = None if wanted is None or given is None else abs(wanted - given)
    if distance is not None and wanted is not None and 0 < distance <= max(relative * abs(wanted), absolute):
        return True
    if not verify(expected, found, timeout_seconds=None):
        return False
    if distance is not None and wanted is not None and given is not None and max(abs(wanted), abs(given)) < _SMALL_BELOW:
        return distance <= _SMALL_RELATIVE * abs(wanted)
    if isinstance(expected[0], sympy.Integer) and abs(int(expected[0])) >= _EXACT_FROM:
        value = found[0].doit() if isinstance(found[0], sympy.Basic) else None
        return isinstance(value, sympy.Integer) and value == expected[0]
    return True


def _as_number(parsed: list[Any]) -> complex | None:
    """The value of what math-verify has read, when it is one finite number."""
    import sympy

    if not parsed or not isinstance(parsed[0], sympy.Expr) or not parsed[0].is_number:
        return None
    value = parsed[0].doit().evalf()  # percentages come as products that sympy was told not to work out
    return complex(value) if value.is_finite else None


def _as_math(text: str) -> str:
    """One math expression: "$69$,$84$" and "69,84" become "$69,84$", "90\\%" keeps its sign."""
    return f"${text.replace('$', '').strip()}$"


def main() -> None:
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not look like a reply
    logging.disable(logging.WARNING)
    equal_answers("\\frac{1}{2}", "0.5")  # imports and compiles everything before the first clock starts
    replies.write(json.dumps({"ready": os.getpid()}) + "\n")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        reply: dict[str, Any]
        # No Python handler: the kernel ends this process even inside C code. So it cannot outlive a parent that was killed meanwhile.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * request["limit_s"] + 1)
        try:
            reply = {
                "equal": equal_answers(request["label"], request["answer"], relative=request["relative"], absolute=request["absolute"])
            }
        except MemoryError:
            reply = {"error": "memory limit"}
        except Exception as error:  # any expression may break the parser in any way; the parent counts it as a grading error
            reply = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
