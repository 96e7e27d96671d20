from __future__ import annotations

from megatron_minpro.tasks.arithmetic_chains.chains import Chain


def test_a_chain_folds_from_the_left_modulo_ten() -> None:
    chain = Chain(values=(7, 6, 4, 6, 7, 1, 5), operations=("-", "-", "*", "-", "*", "*"), modulus=10)
    assert chain.text == "7 - 6 - 4 * 6 - 7 * 1 * 5 :"
    assert chain.result == 5  # 1, -3 = 7, 42 = 2, -5 = 5, 5, 25 = 5
