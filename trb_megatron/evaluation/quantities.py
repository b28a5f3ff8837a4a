r"""Answers that are a number and words, such as `18 eggs` and `5 million`, as plain numbers.

math-verify reads plain letters as a product of variables (`18 eggs` as 18 e g g s), cuts the last
of them off where they spell a unit in its list (`2t` becomes 2), and ignores text whatever it says
(`5 \text{ million}` becomes 5). So such an answer is rewritten before it is compared.
"""

from __future__ import annotations

import re
import string

_TEXT_COMMAND = (
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}"
)
TEXT = re.compile(_TEXT_COMMAND)
_EXPONENT = r"\s*+\^\s*+(?:-?\d|\{\s*+-?\s*+\d\s*+\})"
_UNITS = rf"(?:[A-Za-z. ]|\\cdot\b|{_EXPONENT})+"
# How an answer in LaTeX reads as plain text, in this order.
_PLAIN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_TEXT_COMMAND, r" \1 "),
        (rf"\\[dtc]?frac\s*\{{({_UNITS})\}}\s*\{{({_UNITS})\}}", r" \1/\2"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°", " degrees "),
        (r"(?<=\d)(?:\{,\}|\\!?[,!]|,\\!)(?=\d{3})", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|\\q?quad|~", " "),
        (r"\\?\$|[€£¥₹]|\\pounds\b|^\s*(?:USD|EUR|GBP|Rs\.?)(?=[\s\d])", ""),
        (r"\\%|\bpercent(?:age)?\b|\bpct\b", "%"),
    )
]
_INTEGER = r"(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)"
_QUANTITY = re.compile(
    rf"""\s*(?P<variable>[A-Za-z]\s*=\s*)?(?P<sign>[-+]?)\s*(?:
        (?:(?P<whole>{_INTEGER})\s*)?\\[dtc]?frac\s*\{{(?P<over>\d+)\}}\s*\{{(?P<under>\d+)\}}
        | (?:(?P<whole_2>{_INTEGER})\s+)?(?P<over_2>\d+)\s*/\s*(?P<under_2>\d+)
        | (?P<decimal>{_INTEGER}?\.\d+|{_INTEGER}\.?(?!\d))
    )(?P<percent>\s*%)?(?P<words>.*)""",
    re.VERBOSE | re.DOTALL,
)
_UNIT_TERM = rf"\s*+[A-Za-z]++(?:{_EXPONENT})?"
# Behind a number, a sign of multiplication or the minus of a single letter makes an expression.
_UNIT = re.compile(
    rf"\s*+(?:/|-(?=[A-Za-z]{{2}}))?{_UNIT_TERM}"
    rf"(?:\s*+(?:/\s*+\(|[/*-]|\\cdot\b|\\times\b)?{_UNIT_TERM})*\s*+\)?[\s.]*"
)
_UNIT_SUFFIX = re.compile(r"(?<=degrees)\s+[CF]\b|(?<=[a-z])\s+(?:squared|cubed)\b")
_MEASURED = re.compile(
    r"(?P<expression>[^,;]*\\(?:pi|sqrt)\b[^,;]*?)"
    rf"(?P<unit>(?:\\frac\s*\{{\s*)?{_TEXT_COMMAND}.*)"
)
_SCIENTIFIC = re.compile(
    r"(?P<expression>-?[\d.]+\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\d|\{\s*-?\d+\s*\}))"
    r"(?P<unit>[\s\\].+)"
)
_LONGEST_QUANTITY = 200  # characters


def as_text(answer: str) -> str:
    """The answer without the commands that set text and upright letters."""
    return " ".join(TEXT.sub(r"\1", answer).split())


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A word of four letters or more counts as a unit: it can be any noun. These mean more than that.
_NO_UNITS = _words(
    """zero three four five seven eight nine eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety half halves
    third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth
    eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths millionth
    millionths couple score gross double triple twice lakh lakhs crore crores myriad grand
    quadrillion quintillion googol plus minus times over than then choose modulo base factorial
    squared cubed root divided multiplied remainder infinity negative equals equal when where
    unless except either both between until through neither none with without sqrt sine cosine
    alpha beta gamma delta epsilon zeta theta iota kappa lambda sigma omega"""
)
_FUNCTION = re.compile(
    r"(?:a?(?:sin|cos|tan|sec|csc|cot)h?|arc[a-z]+|log|ln|exp|sqrt|max|min)[a-z]"
)
_SHORT_UNITS = _words(
    """m g s h l L mm cm dm km kg mg ml dl cl ft in yd yds mi lb lbs oz pt pts qt gal mph kmh kph
    rpm hr hrs min mins sec secs ms wk mo yr yrs am pm th st nd rd deg rad hz khz kw kwh kj pa mol
    cc sq usd eur gbp cts pcs day bit egg men man boy cow dog cat pig hen bee ant bag box cup can
    car bus pen pie jar bar toy job row hat old all logs tank"""
)
_INNER_WORDS = _words("per a an each every of the in on for at by")
_SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


def rewrite_quantity(answer: str) -> str:
    r"""An answer that is a number and words, as math-verify reads it rightly; others as they are.

    Units go (`\$1,800 per day` is 1800) and are not compared; percent stays, which math-verify
    knows. Words that count are numbers (`5 million` is 5 * 1000000), and so are mixed fractions
    (`1 1/2` is 3/2). What else follows the number stays part of the answer.
    """
    if len(answer) > _LONGEST_QUANTITY:
        return answer
    for pattern in (_MEASURED, _SCIENTIFIC):  # 2\pi\text{ cm}, 6.02 \times 10^{23} mol
        measured = pattern.fullmatch(answer)
        if measured and _is_unit(_plain(f" {measured['unit']}"), _is_upright(measured["unit"])):
            return measured["expression"]
    plain = _plain(answer)
    match = _QUANTITY.fullmatch(plain)
    if match is None:
        return answer
    words = _UNIT_SUFFIX.sub("", match["words"])
    factors = [_number(match)]
    while scale := re.match(rf"\s*({'|'.join(_SCALES)})s?\b", words):
        factors.append(str(_SCALES[scale[1]]))
        words = words[scale.end() :]
    number = (match["variable"] or "") + " \\cdot ".join(factors)
    number += "\\%" if match["percent"] else ""
    if not words.strip(" .") or _is_unit(words, _is_upright(answer)):
        return number
    if TEXT.search(answer) and (re.search(r"\d", words) or _NO_UNITS & set(words.split())):
        return plain  # math-verify would ignore it
    if words.strip().isalpha() and not TEXT.search(answer):
        return f"{number}({words.strip()})"  # math-verify would cut off what looks like a unit
    return answer


def _plain(latex: str) -> str:
    for pattern, replacement in _PLAIN:
        latex = pattern.sub(replacement, latex)
    return latex


def _number(match: re.Match[str]) -> str:
    """The number of a quantity, without separators of thousands."""
    over, under = match["over"] or match["over_2"], match["under"] or match["under_2"]
    if over is None:
        return match["sign"] + match["decimal"].replace(",", "").rstrip(".")
    whole = (match["whole"] or match["whole_2"] or "0").replace(",", "")
    return f"{match['sign']}\\frac{{{int(whole) * int(under) + int(over)}}}{{{under}}}"


def _is_upright(latex: str) -> bool:
    r"""Whether all letters are set as text: \text{N} is the newton, N a variable."""
    outside = re.sub(r"\\[A-Za-z]+", "", TEXT.sub("", latex))
    return outside != latex and not re.search("[A-Za-z]", outside)


def _is_unit(text: str, is_upright: bool) -> bool:
    """Whether what follows a number is a unit or names what was counted, and nothing more."""
    if text.strip() == "times":  # as an answer to "how many times"
        return True
    if not _UNIT.fullmatch(text):
        return False
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]+", text)
    is_product = words[0] not in _SHORT_UNITS or (len(words[0]) == 1 and text != words[0])
    if text[0].isalpha() and is_product:  # 2xy
        return False
    is_noun = [_is_noun(word) or (is_upright and len(word) == 1) for word in words]
    return is_noun[-1] and all(
        noun or word in _INNER_WORDS for noun, word in zip(is_noun, words, strict=True)
    )


def _is_noun(word: str) -> bool:
    if len(word) == 1:
        return word in _SHORT_UNITS
    word = word.lower()
    return word in _SHORT_UNITS or (
        len(word) >= 4
        and word not in _NO_UNITS
        and word.removesuffix("s") not in _SCALES
        and not _FUNCTION.fullmatch(word)
        and re.search("[aeiouy]", word) is not None
        and word not in string.ascii_lowercase
    )
