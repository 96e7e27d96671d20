"""Text of a model as a page may show it: what would be invisible, or would move its neighbours, stands as a mark."""

from __future__ import annotations

# Names of the controls that reorder text (Unicode, UAX 9) and of characters without width.
_NAMED = {
    "\u061c": "ALM",
    "\u200b": "ZWSP",
    "\u200c": "ZWNJ",
    "\u200d": "ZWJ",
    "\u200e": "LRM",
    "\u200f": "RLM",
    "\u2028": "LSEP",
    "\u2029": "PSEP",
    "\u202a": "LRE",
    "\u202b": "RLE",
    "\u202c": "PDF",
    "\u202d": "LRO",
    "\u202e": "RLO",
    "\u2060": "WJ",
    "\u2066": "LRI",
    "\u2067": "RLI",
    "\u2068": "FSI",
    "\u2069": "PDI",
    "\ufeff": "BOM",
}
_KEPT = "\n\t"  # the page shows both
_SURROGATES = range(0xD800, 0xE000)
_MARKS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT},  # the pictures that Unicode has for them
    0x7F: "\u2421",
    **{code: f"⟨{code:02X}⟩" for code in range(0x80, 0xA0)},
    **{ord(character): f"⟨{name}⟩" for character, name in _NAMED.items()},
    **dict.fromkeys(_SURROGATES, "\ufffd"),
}


def visible(text: str, *, limit: int | None = None) -> str:
    """Text with marks for controls: ESC becomes ␛, a right-to-left override ⟨RLO⟩. Newlines and tabs stay.

    limit: characters that are kept; the rest is counted at the end.
    """
    if limit is not None and len(text) > limit:
        return f"{text[:limit].translate(_MARKS)}… ({len(text) - limit:,} more characters)"
    return text.translate(_MARKS)
