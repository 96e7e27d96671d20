"""Chains: operations (+, -, *) folded from the left, modulo a small number.

The prompt lists them, `3 + 4 * 2 - 5 :`, and the response writes one step per operation, `3 + 4 = 7 ; 7 * 2 = 4 ; 4 - 5 = 9 ;`. The last
result is the answer; a blind guess is right once in `modulus` times.
"""

from __future__ import annotations

from dataclasses import dataclass

OPERATIONS = ("+", "-", "*")
EQUALS, STEP_END, CHAIN_END = "=", ";", ":"


def words(modulus: int) -> list[str]:
    """Every word of a chain and of its solution."""
    return [*map(str, range(modulus)), *OPERATIONS, EQUALS, STEP_END, CHAIN_END]


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
