"""Answers graded per second: the pool of workers with a time limit per answer, against math-verify called in this process."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from math_verify import parse, verify
from rows import Row, median_seconds

from megatron_minpro.rewards.grader_pool import GraderPool

# (label, answer) as the benchmarks have them: integers, fractions, roots, intervals, tuples, polynomials, text. N is another number in
# each round, for sympy remembers what it has computed.
_PAIRS = (
    ("20N", "20N"),
    ("0N5", "N5"),
    ("\\frac{N}{997}", "N/997"),
    ("2\\sqrt{N}", "\\sqrt{4 \\cdot N}"),
    ("[-N, 7000)", "[-N,7000)"),
    ("(N, \\frac{\\pi}{2})", "(N, \\pi/2)"),
    ("x^2+Nx", "x(x+N)"),
    ("N.5", "\\frac{2 \\cdot N + 1}{2}"),
    ("\\{1, 2, N\\}", "\\{N, 1, 2\\}"),
    ("-\\frac{1}{N}", "\\frac{1}{N}"),
    ("Np - q", "q - Np"),
    ("1008N", "a number near 1008N"),
)
_ROUNDS = 25


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about every answer that is not mathematics
    pairs = [(label.replace("N", str(n)), answer.replace("N", str(n))) for n in range(11, 11 + _ROUNDS) for label, answer in _PAIRS]
    direct = median_seconds(lambda: [verify(parse(f"${label}$"), parse(f"${answer}$")) for label, answer in pairs], repeats=3)
    found = []
    for workers, target in ((1, 1.5), (os.cpu_count() or 1, 1.0)):
        with GraderPool(workers=workers, timeout_s=10.0, memory_mb=4096) as pool:
            seconds = median_seconds(lambda pool=pool: pool.compare(pairs), repeats=3)  # type: ignore[misc]
        found.append(
            Row(
                name=f"grading {len(pairs)} answers, {workers} worker{'s' * (workers > 1)}: {len(pairs) / seconds:.0f} answers/s",
                seconds=seconds,
                peer=f"math-verify in the process: {len(pairs) / direct:.0f} answers/s",
                peer_seconds=direct,
                target=target,
            )
        )
    return found
