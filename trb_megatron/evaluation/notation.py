r"""One notation for answers that mean the same: characters, wrapping, separators, spelling.

Each rule has its reason. What no rule names reaches math-verify as it was written.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """What is replaced, by what, and why."""

    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]
    reason: str


def _rules(*table: tuple[str, str | Callable[[re.Match[str]], str], str]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(pattern), new, reason) for pattern, new, reason in table)


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for rule in rules:
        text = rule.pattern.sub(rule.replacement, text)
    return text


# ---------------------------------------------------------------- characters

_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\ufe63", "-"),
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "±": r"\pm ",
    "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "≈": r"\approx ", "º": "°", "∶": ":", "。": ".", "，": ",", "、": ",", "\u2018": "'",
    "\u2019": "'", "\u201c": '"', "\u201d": '"',
}  # fmt: skip
_SUPERSCRIPTS = {"⁺": "+", "⁻": "-", "ⁿ": "n", **{c: str(n) for n, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}}
_SUBSCRIPTS = {"₊": "+", "₋": "-", "ₙ": "n", **{c: str(n) for n, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}}
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOTS = _rules(
    (r"√\s*(?:(\d+(?:\.\d+)?|[a-zA-Z])|\(([^()]*)\))",
     lambda match: rf"\sqrt{{{match[1] or match[2]}}}", "a root sign covers what follows it"),
    (r"∛\s*(?:(\d+(?:\.\d+)?|[a-zA-Z])|\(([^()]*)\))",
     lambda match: rf"\sqrt[3]{{{match[1] or match[2]}}}", "and so does that of a cube root"),
    (r"(?<![\w)}])(?<![\w)}]\s)[–—](?=\s*[\d.\\])", "-",
     "a dash before a number, but not between two (5–6), is a minus sign"),
)  # fmt: skip


def plain_characters(text: str) -> str:
    """The text in ASCII, where its characters have an equal in ASCII or LaTeX.

    Digits of all scripts, full-width and mathematical letters, kinds of minus and of spaces; what
    is invisible goes.
    """
    if text.isascii():
        return text
    text = _RAISED.sub(lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m[0])}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{''.join(_SUBSCRIPTS[c] for c in m[0])}}}", text)
    return _apply(_ROOTS, "".join(c if c.isascii() else _plain_character(c) for c in text))


def _plain_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    category = unicodedata.category(character)
    if category == "Cf":  # zero-width spaces and joiners, byte-order marks, soft hyphens
        return ""
    if category == "Zs":
        return " "
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if 0xFF01 <= ord(character) <= 0xFF5E or 0x1D400 <= ord(character) <= 0x1D7FF:
        return unicodedata.normalize("NFKC", character)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        over, _, under = unicodedata.normalize("NFKC", character).partition("⁄")
        return rf"\frac{{{over}}}{{{under}}}"
    return character


# ---------------------------------------------------------------- what stands around an answer

_STYLES = (
    "text(?:bf|it|rm|sf|tt|sc|up|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|underline"
    "|boxed|fbox|framebox|ensuremath|emph|bm|boldsymbol|displaystyle"
)
_STYLED = re.compile(rf"(?:\\(?:{_STYLES}|(?:text)?color\s*\{{\w+\}}))?\s*(?=\{{)")
_WRAPPINGS = _rules(
    (r"\s*\$\$?((?:[^$]|\\\$)+)\$\$?\s*", r"\1", "formulas stand between dollars"),
    (r"\s*\\\((.+)\\\)\s*", r"\1", "or between these"),
    (r"\s*\\\[(.+)\\\]\s*", r"\1", "or these"),
    (r"\s*(\*{1,3}|_{1,3}|`+)((?:(?!\1).)+)\1\s*", r"\2", "Markdown: bold, italics, code"),
    (r"\s*#{1,6}\s+(.+)", r"\1", "Markdown: a heading"),
    (r"\s*([\"'])((?:(?!\1).)+)\1\s*", r"\2", "quotation marks"),
    (r"\s*<([a-z]+)>(.+)</\1>\s*", r"\2", "tags, such as those of an answer"),
    (r"(?i)\s*\W{0,3}(?:the\s+)?(?:final\s+|correct\s+|right\s+)?answer\s*(?:\*+\s*)?(?:is\b:?|[:=])"
     r"(?:\s*\*+)?\s*(.+)", r"\1", "a label"),
    (r"(?i)\s*\\(?:text(?:bf)?|mathrm)\s*\{[^{}]*\banswer\s*(?:is)?\s*[:=]?\s*\}\s*[:=]?\s*(.+)",
     r"\1", "a label in LaTeX"),
    (r"\s*(?:\\approx|\\sim|~|=|:)\s*(.+)", r"\1", "what led to the answer is no part of it"),
    (r"\\begin\{(aligned|align\*?|equation\*?|gather(?:ed|\*)?|split)\}([^&]*)\\end\{\1\}", r"\2",
     "an environment"),
    (r"(.*?[^\s.,;:?\\])\s*(?:[,;:?]|\.(?!\.)|\\{1,2}[,;:!]?)\s*", r"\1",
     "a full stop or another mark closes the sentence, not the answer"),
)  # fmt: skip


def unwrap(text: str) -> str:
    """The answer without what stands around all of it: styles, delimiters, marks, labels."""
    before = None
    while text != before:
        before = text = text.strip()
        for rule in _WRAPPINGS:
            if match := rule.pattern.fullmatch(text):
                text = match.expand(str(rule.replacement))
        if (styled := _STYLED.match(text)) and closing_brace(text, styled.end()) == len(text) - 1:
            text = text[styled.end() + 1 : -1]
    return text


def closing_brace(text: str, opening: int) -> int | None:
    r"""Where the brace that opens at `opening` is closed; None: nowhere. `\{` is no brace."""
    depth, place = 0, opening
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    return None


# ---------------------------------------------------------------- inside an answer


def _repeating(match: re.Match[str]) -> str:
    """A decimal with a repeating part as a fraction: 0.1\\overline{6} is (16 - 1) / 90."""
    sign, whole, fixed, repeated = match.groups(default="")[:4]
    over = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return rf"{sign}\frac{{{over}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


_MARK = r"[-+=<>*/.,;:!]|\\(?:leq?|geq?|neq?|lt|gt|times|cdot|div|pm|mp|in|cup|cap)(?![a-zA-Z])"
_SET_MARK = r"(?:\\(?:text|mathrm|mathord|mathbin|mathrel|mathop|mathpunct)\s*)?"
_BRACKETS = {"brace": (r"\{", r"\}"), "brack": "[]", "paren": "()"}
_ORDINAL = r"\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}"
_PART = r"(?:[^{}()]|\{[^{}]*\}|\([^()]*\))"  # a character, or brackets and what is in them
_BINOMIAL = rf"\\binom\s*\{{{_PART}*\}}\s*\{{{_PART}*\}}"
_GROUPED = r"\d{1,3}(?:[ ']\d{3})+"
_SPELLINGS = _rules(
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", "", "sizes of brackets"),
    (r"\\(?:displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])", "", "styles of formulas"),
    (r"(?<=\d)(?:\{,\}|,\\!|\\!,)(?=\d{3}(?!\d))", "", "LaTeX for a comma between thousands"),
    (r"(?<=\d)\{,\}(?=\d)", ".", "LaTeX for a decimal comma"),
    (rf"(?<![\\^_])(?<![\^_]\s){_SET_MARK}\{{\s*({_MARK})\s*\}}",
     lambda m: m[1] if len(m[1]) == 1 else f"{m[1]} ",
     "braces that only change the space around a sign"),
    (r"\\([lr])(brace|brack|paren)(?![a-zA-Z])", lambda m: _BRACKETS[m[2]][m[1] == "r"],
     "brackets by name"),
    (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\", "space between the rows of a matrix"),
    (r"(?<!\\)\\!", "", "a negative space"),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\\[hv]space\*?\{[^{}]*\}", " ", "spaces"),
    (rf"(?<![\d.,_^]){_GROUPED}(?![\d/])(?!\s*\d)", lambda m: re.sub("[ ']", "", m[0]),
     "a space or an apostrophe between thousands"),
    (rf"(?:\{{|(?<=\()|\A)({_PART}*?)\\choose(?![a-zA-Z])\s*({_PART}*)(?:\}}|(?=\))|\Z)",
     r"\\binom{\1}{\2}", "TeX's own binomials"),
    (r"\\[dtc](frac|binom)(?![a-zA-Z])", r"\\\1", "sizes of fractions and binomials"),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}", "of single digits, they need no braces"),
    (r"\\(frac|binom)\s*(\d)\s*\{", r"\\\1{\2}{", "nor does one half of them"),
    (r"\\(frac|binom)\s*\{([^{}]*)\}\s*(\d)", r"\\\1{\2}{\3}", "or the other"),
    (r"(?<![\w.^_\\}])(\d+)\s*(?=\\binom\b|\(\s*(?:\d|\\(?:frac|binom)\b))", r"\1 \\cdot ",
     "a product of integers, which math-verify adds, as in a mixed number"),
    (rf"(\(\s*-?\s*\d+\s*\)|{_BINOMIAL})\s*(?=[\d(]|\\(?:frac|binom)\b)",
     r"\1 \\cdot ", "also where the first one is in brackets"),
    (r"(-?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", _repeating,
     "a decimal whose last digits repeat is a fraction"),
    (r"(-?)(\d*)\.(\d*?)(\d|(?=(\d{2,6})\5)\5)(?:\4\4+|(?<=\d\d)\4)\s*(?:\.{3}|…|\\[lc]?dots)",
     _repeating, "also where dots say that they repeat"),
    (r"(?<![\w.}\\])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.])",
     lambda m: rf"{m[1]} \times 10^{{{int(m[2])}}}", "1.5e3 is a number; 1.5 e - 3 is not"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)\s*[({]*\s*)(\d+(?:\.\d+)?)\s*(?:\^\s*\{?\s*\\circ\s*\}?|°)",
     r"\1\\frac{\2\\pi}{180}", "degrees of a function, which math-verify takes for radians"),
    (r"(?<![\\A-Za-z])(sin|cos|tan|cot|csc|ln|log|exp|pi)(?![A-Za-z])", r"\\\1 ",
     "functions and pi without a backslash"),
    (r"\\colon(?![a-z])", ":", "a colon by name"),
    (r"(?<=[\d}])\s*(?:\\(?:text|mathrm)\s*\{\s*to\s*\}|to)\s*(?=\d|\\(?:frac|sqrt)\b)", ":",
     "a ratio in words"),
    (rf"(?<=\d)\s*(?:\^\s*)?(?:{_ORDINAL}|\{{\s*{_ORDINAL}\s*\}})", "",
     "the ending of an ordinal number"),
    (r"\\varnothing|\\empty(?![a-z])|\\\{\s*\\\}", r"\\emptyset", "names of the empty set"),
    (r",?\s*\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}\s*", ", ", "the answers of a list"),
    (r"(?<=[\w)}\]%$])\s*,?\s+(?:and|or)\s+(?=[-+\w(\\$])", ", ", "also without LaTeX"),
    (r"\s*;\s*", ", ", "and with semicolons"),
)  # fmt: skip
_COMMAS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:,\d{3})+(?![\d]|,\d|,\s*\\[lc]?dots)")


def one_spelling(text: str) -> str:
    """The answer with one spelling of separators, spaces, fractions, lists and powers of ten.

    Commas between thousands go, but not inside brackets: (1,234) is a pair.
    """
    text = _apply(_SPELLINGS, text)
    depths = _depths(text, r"\\[{}]|[()\[\]]")
    return _COMMAS.sub(
        lambda match: match[0] if depths[match.start()] else match[0].replace(",", ""), text
    )


_SET = re.compile(r"(\\\{)((?:(?!\\[{}]).)*)(\\\})")
_PLUS_MINUS, _MINUS_PLUS = re.compile(r"\\pm(?![a-zA-Z])"), re.compile(r"\\mp(?![a-zA-Z])")
_NO_SUM = re.compile(r"(\A|[=<>({\[,])\s*\+\s*")


def write_out_signs(text: str) -> str:
    r"""The list in which 1 \pm 2 are the two parts 1 + 2 and 1 - 2.

    Of `\pm` and `\mp` in one part, the upper signs belong together. A part that has one of them
    twice stays: whether `\pm 1 \pm i` are two or four numbers is not said.
    """
    if not (_PLUS_MINUS.search(text) or _MINUS_PLUS.search(text)):
        return text
    opening, inner, closing = match.groups() if (match := _SET.fullmatch(text)) else ("", text, "")
    parts = []
    for part in split_list(inner):
        if max(len(sign.findall(part)) for sign in (_PLUS_MINUS, _MINUS_PLUS)) != 1:
            parts.append(part)
            continue
        for upper, lower in ("+-", "-+"):
            signed = _MINUS_PLUS.sub(lower, _PLUS_MINUS.sub(upper, part))
            parts.append(_NO_SUM.sub(r"\1", signed))
    return f"{opening}{', '.join(parts)}{closing}"


def split_list(text: str, mark: str = ",") -> list[str]:
    """The parts between those commas, or other marks, that stand in no brackets."""
    depths = _depths(text, r"[()\[\]{}]")
    marks = [place for place, c in enumerate(text) if c == mark and depths[place] == 0]
    return [
        text[start + 1 : end].strip()
        for start, end in zip([-1, *marks], [*marks, len(text)], strict=True)
    ]


def _depths(text: str, brackets: str) -> list[int]:
    """How many brackets of these are open at each character."""
    changes = [0] * len(text)
    for bracket in re.finditer(brackets, text):
        changes[bracket.start()] = 1 if bracket[0][-1] in "([{" else -1
    return list(itertools.accumulate(changes))
