from __future__ import annotations

import pytest

from megatron_minpro.report.page.visible_text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("a\x00b\x7f\x9b", "a␀b␡⟨9B⟩"),
        ("\u202eevil\u202c", "⟨RLO⟩evil⟨PDF⟩"),
        ("\u2066x\u2069\u200f\u200b", "⟨LRI⟩x⟨PDI⟩⟨RLM⟩⟨ZWSP⟩"),
        ("line\nnext\tcell\r", "line\nnext\tcell␍"),
        ("lone \ud800", "lone \ufffd"),
        ("plain é 世界 😀", "plain é 世界 😀"),
    ],
)
def test_controls_become_marks_and_other_text_stays(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_long_text_says_how_much_is_left_out() -> None:
    assert visible("x" * 1_000_000, limit=5) == "xxxxx… (999,995 more characters)"
    assert visible("xxxxx", limit=5) == "xxxxx"
