"""How the constants of parallel/planner/efficiency.py were found, to be repeated: least squares in logarithms, held near priors.

python -m parallel.planner.fit prints the constants that the rows marked `fit` give.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from parallel.planner.efficiency import Efficiency
from parallel.planner.published import Row, read_rows

ROW_ERROR = 0.06  # what the same configuration scatters by between publications
# Name, prior, and how far from it a constant may be expected, in logarithms.
PRIORS: dict[str, tuple[float, float]] = {
    "gemm": (0.75, 0.10),
    "grouped_gemm": (0.55, 0.15),
    "fp8_gemm": (0.60, 0.20),
    "fp8_grouped_gemm": (0.45, 0.25),
    "attention_forward": (0.66, 0.12),
    "attention_backward": (0.53, 0.12),
    "attention_half_length": (1300.0, 0.20),
    "fp8_attention": (1.4, 0.15),
    "memory": (0.75, 0.15),
    "network": (0.85, 0.10),
    "nvlink_dispatch": (0.75, 0.15),
    "hidden_alltoall": (0.55, 0.20),
    "hidden_deepep": (0.50, 0.20),
    "hidden_hybridep": (0.85, 0.08),
    "kernel_gaps_us": (400.0, 0.40),
    "launches_layer": (400.0, 0.40),
    "launches_fp8_layer": (200.0, 0.50),
    "launches_expert": (6.0, 0.40),
    "launches_fp8_expert": (80.0, 0.50),
    "partial_graphs": (0.6, 0.20),
    "release_2025": (2.5, 0.40),
    "alltoall_sync": (0.5, 0.40),
}


def fit(rows: Sequence[Row], *, iterations: int = 12) -> Efficiency:
    """Gauss-Newton with step halving. Deterministic."""
    names = list(PRIORS)
    prior = np.log([PRIORS[name][0] for name in names])
    width = np.array([PRIORS[name][1] for name in names])

    def residuals(x: np.ndarray) -> np.ndarray:
        efficiency = efficiency_of(names, x)
        errors = [math.log(row.predicted_s(efficiency) / row.published_s) / ROW_ERROR for row in rows]
        return np.concatenate([errors, (x - prior) / width])

    x = prior.copy()
    value = residuals(x)
    for _ in range(iterations):
        jacobian = np.empty((len(value), len(x)))
        for index in range(len(x)):
            moved = x.copy()
            moved[index] += 1e-4
            jacobian[:, index] = (residuals(moved) - value) / 1e-4
        step = np.linalg.lstsq(jacobian, -value, rcond=None)[0]
        for halving in range(6):
            candidate = residuals(x + step / 2**halving)
            if candidate @ candidate < value @ value:
                x, value = x + step / 2**halving, candidate
                break
        else:
            break
    return efficiency_of(names, x)


def efficiency_of(names: Sequence[str], x: np.ndarray) -> Efficiency:
    return dataclasses.replace(Efficiency(), **{name: float(value) for name, value in zip(names, np.exp(x), strict=True)})


def main() -> None:
    rows = [row for row in read_rows() if row.use == "fit"]
    found = fit(rows)
    for name, (prior, _) in PRIORS.items():
        print(f"{name:22} {getattr(found, name):8.3f}   prior {prior}")


if __name__ == "__main__":
    main()
