"""Typography of answers: Unicode signs, Markdown, colours and layout commands become plain LaTeX in ASCII. Linear time."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ", "0123456789+-()nx")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ]+")
_OVERLINED_DIGITS = re.compile("(?:[0-9][\u0304\u0305])+")
_DOTTED_DIGIT = re.compile("([0-9])\u0307")
# A typographic space between groups of three digits. A plain space is judged where a whole number is read.
_GROUP_SPACE = re.compile("(?<=[0-9])[\u00a0\u2000-\u200a\u202f\u205f](?=[0-9]{3}(?![0-9]))")
_GROUP_MARK = re.compile("(?<=[0-9])(?:['\u2019_]|\\\\[,!;: ]|\\{,\\}|,\\\\!\\s*|\\{\\\\,\\}|~)(?=[0-9]{3}(?![0-9]))")
_DECIMAL_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
_INVISIBLE = dict.fromkeys(
    map(ord, "\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\ufeff\ufe0e\ufe0f\u202a\u202b\u202c")
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e\u2189]")
_FRACTION_SLASH = re.compile("([0-9]+)\u2044([0-9]+)")
_ROOT_NAMES = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+)|(?=\{))")
_WORD_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|(?=\{)|([0-9]+))")
_WORD_SYMBOLS = re.compile(r"(?<![\\A-Za-z])(pi|infinity|infty|inf|oo)(?![A-Za-z])")
_WORD_SYMBOL_NAMES = {"pi": "\\pi ", "infinity": "\\infty ", "infty": "\\infty ", "inf": "\\infty ", "oo": "\\infty "}
_SIGNS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\ufe63": "-", "×": "\\times ",
    "✕": "\\times ", "✖": "\\times ", "⨯": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "•": "\\cdot ", "÷": "\\div ",
    "∕": "/", "\u2044": "/", "±": "\\pm ", "∓": "\\mp ", "≤": "\\le ", "⩽": "\\le ", "≦": "\\le ", "≥": "\\ge ", "⩾": "\\ge ",
    "≧": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≃": "\\approx ", "≅": "\\approx ", "≒": "\\approx ", "∼": "\\approx ",
    "∞": "\\infty ", "°": "^\\circ ", "\u2218": "^\\circ ", "\u02da": "^\\circ ", "\u2032": "'", "\u2019": "'", "\u2018": "'",
    "\u201c": "\"", "\u201d": "\"", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "⌀": "\\emptyset ",
    "∖": "\\setminus ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "⟨": "\\langle ", "⟩": "\\rangle ", "〈": "\\langle ", "〉": "\\rangle ", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ",
    "⌉": "\\rceil ", "∠": "\\angle ", "△": "\\triangle ", "→": "\\to ", "⇒": "\\implies ", "∴": "\\therefore ", "。": ".", "、": ",",
    "\u2236": ":", "€": "\\euro ", "£": "\\pound ", "¥": "\\yen ", "¢": "\\cent ", "\u2223": "|", "ℓ": "\\ell ", "…": "...",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "ε": "\\epsilon ", "ζ": "\\zeta ", "η": "\\eta ",
    "θ": "\\theta ", "κ": "\\kappa ", "λ": "\\lambda ", "μ": "\\mu ", "ν": "\\nu ", "ξ": "\\xi ", "π": "\\pi ", "ρ": "\\rho ",
    "σ": "\\sigma ", "τ": "\\tau ", "φ": "\\phi ", "χ": "\\chi ", "ψ": "\\psi ", "ω": "\\omega ", "Γ": "\\Gamma ", "Δ": "\\Delta ",
    "Θ": "\\Theta ", "Λ": "\\Lambda ", "Π": "\\Pi ", "Σ": "\\Sigma ", "Φ": "\\Phi ", "Ψ": "\\Psi ", "Ω": "\\Omega ",
}  # fmt: skip
_SIGN_TABLE = str.maketrans(_SIGNS)

_COLOUR = re.compile(
    r"\\(?:textcolor|mathcolor|colorbox)\s*(?:\[[^\]{}]*\])?\s*\{[^{}]*\}|\\color\s*(?:\[[^\]{}]*\])?\s*\{[^{}]*\}"
    r"|\\bbox\s*\[[^\[\]]*\]|\\fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}"
)
_LAYOUT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|hfill|centering|bf|bfseries|it|large|Large|LARGE|huge|Huge|small"
    r"|normalsize|tiny|boldmath|qedhere|checkmark|blacksquare|notag|nonumber)(?![A-Za-z])"
    r"|\\[hv]space\*?\s*\{[^{}]*\}|\\(?:tag|label)\*?\s*\{[^{}]*\}|\\(?:begin|end)\s*\{(?:align|aligned|equation|gather|gathered|center)\*?\}"
)
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb|mathsf|mathtt|mathnormal|underline|ensuremath|mathord|fbox|framebox)(?=\s*\{)")
_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=[^A-Za-z0-9]|$)")
_POWER = re.compile(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\+-])")
_MARKUP = re.compile(r"</?(?:s|b|i|em|strong|p|br|span|div|u|answer|code|center|mark)\s*/?>", re.IGNORECASE)
_DOLLAR = re.compile(r"(?<!\\)\$")  # a math delimiter, not money
_SPACING = re.compile(r"(?<!\\)\\(?:[,;:!> \n]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace|enspace|space(?![A-Za-z]))|~")

# In this order: a longer command stands before its beginning.
_SPELLINGS = (
    ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cfrac", "\\frac"), ("\\leqslant", "\\le"), ("\\geqslant", "\\ge"),
    ("\\leq", "\\le"), ("\\geq", "\\ge"), ("\\neq", "\\ne"), ("<=", "\\le "), (">=", "\\ge "), ("\\lt", "<"), ("\\gt", ">"),
    ("\\simeq", "\\approx"), ("\\varnothing", "\\emptyset"), ("\\degree", "^\\circ"), ("\\lbrace", "\\{"), ("\\rbrace", "\\}"),
    ("+/-", "\\pm "), ("\\colon", ":"), ("\\ast", "*"), ("&=", "="), ("&nbsp;", " "), ("&lt;", "<"), ("&gt;", ">"),
)  # fmt: skip


def as_latex(text: str) -> str:
    """An answer in the LaTeX that the other rules read: ASCII where it has a meaning, one command per sign, no layout and no colour.

    "１½ ≤ x" becomes "1\\frac{1}{2} \\le x", "\\color{red}{42}" becomes "42" in braces, "2**10" becomes "2^10". Text is kept.
    """
    text = _GROUP_MARK.sub("", text if text.isascii() else _ascii_signs(text))
    text = _DECIMAL_COMMA.sub(".", text)
    text = _FONT.sub("", _LAYOUT.sub(" ", _COLOUR.sub("", _MARKUP.sub(" ", text))))
    text = _SPACING.sub(" ", _SIZE.sub("", text.replace("\\left\\{", "\\{").replace("\\right\\}", "\\}")))
    for command, plain in _SPELLINGS:
        if command in text:
            text = text.replace(command, plain)
    text = _WORD_ROOT.sub(lambda match: "\\sqrt" if match[1] is None and match[2] is None else f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _WORD_SYMBOLS.sub(lambda match: _WORD_SYMBOL_NAMES[match[1]], text)
    text = _POWER.sub("^", text) if not text.lstrip().startswith("**") else text
    text = text.replace("**", " ").replace("`", "")
    text = _DOLLAR.sub(" ", text)
    return without_outer_braces(" ".join(text.split()))


def without_outer_braces(text: str) -> str:
    """A text without braces that enclose all of it: "{42}" becomes "42", "{a}{b}" stays."""
    while text.startswith("{") and text.endswith("}") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text: str, opening: int) -> int:
    """The index of the brace that closes the one at `opening`; -1 when none does. Escaped braces are text."""
    depth, index = 0, opening
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return index
        index += 1
    return -1


def _ascii_signs(text: str) -> str:
    text = _GROUP_SPACE.sub("", text.translate(_INVISIBLE))
    text = _OVERLINED_DIGITS.sub(lambda match: f"\\overline{{{re.sub('[^0-9]', '', match[0])}}}", text)
    text = _DOTTED_DIGIT.sub(r"\\dot{\1}", text)
    text = _SUPERSCRIPT_RUN.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT_RUN.sub(lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text).replace("\u00ba", "\u00b0")
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = unicodedata.normalize("NFKC", text)
    text = _FRACTION_SLASH.sub(r"\\frac{\1}{\2}", text)
    text = _ROOT.sub(_root, text.translate({character: _SIGNS[chr(character)] for character in map(ord, "π−×·⋅")}))
    text = text.translate(_SIGN_TABLE)
    return "".join(
        str(unicodedata.decimal(letter))
        if not letter.isascii() and letter.isdecimal()
        else " "
        if unicodedata.category(letter) == "So"
        else letter
        for letter in text
    )


def _vulgar_fraction(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"


def _root(match: re.Match[str]) -> str:
    name = _ROOT_NAMES[match[1]]
    inside = match[2] if match[2] is not None else match[3]
    return name if inside is None else f"{name}{{{inside}}}"
