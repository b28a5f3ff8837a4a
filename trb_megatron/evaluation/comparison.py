r"""Whether an answer equals the right one: numbers, choices, words and lists by rule, the rest by
math-verify.

math-verify compares numbers to six places, so that 1e-9 equals 2e-9; it compares words as products
of their letters, so that ACB equals CAB; and it takes a pair for a set. These are compared here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import math_verify
import sympy

from trb_megatron.evaluation.final_answer import find_answer, stated_answer
from trb_megatron.evaluation.notation import one_spelling, plain_characters, split_list, unwrap
from trb_megatron.evaluation.quantities import TEXT, rewrite_quantity

_LONGEST = 2000  # characters of an answer that rules look at; math-verify alone gets longer ones
_MOST_DIGITS = 4000


def grade(response: str, answers: list[str]) -> tuple[bool, str | None]:
    """Whether the final answer of a response is one of the right ones, and the answer as read."""
    found = find_answer(response)
    if found is None:
        return False, None
    if found.is_marked:
        answer = normalize(found.text)
        return any(is_right(right_answer(gold), answer) for gold in answers), answer
    parsed = math_verify.parse(found.text.replace("`", " "), parsing_timeout=0)
    stated = normalize(stated_answer(found.text))
    read = str(parsed[-1]) if parsed else None
    for gold in map(right_answer, answers):
        if _choice(gold) or _words(gold):
            read = stated or None
            if is_right(gold, stated):
                return True, read
        elif parsed and (_same_number(gold, normalize(str(parsed[-1]))) or _agree(gold, parsed)):
            return True, read
    return False, read


def right_answer(gold: str) -> str:
    """The right answer of a problem, normalized; of a solution, what its last box holds."""
    found = find_answer(gold)
    return normalize(found.text if found is not None and found.is_marked else gold) or gold.strip()


def normalize(answer: str) -> str:
    """The answer in the one notation in which it is compared."""
    answer = " ".join(plain_characters(answer).split())
    if len(answer) > _LONGEST:
        return answer
    return unwrap(rewrite_quantity(one_spelling(unwrap(answer))))


def is_right(gold: str, answer: str) -> bool:
    """Whether two normalized answers are the same."""
    if not answer or not gold:
        return False
    if _without_spaces(gold) == _without_spaces(answer):
        return True
    gold, answer = _without_names(gold, answer)
    for rule in (_same_number, _same_choice, _same_words, _same_time, _same_numeral, _same_list):
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    return _agree(gold, _parse(answer))


def _without_spaces(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # but 2 1/3 is not 21/3


_NAME = r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'?"
_NAMED = re.compile(rf"({_NAME}|\\angle\s*[A-Z]+|\({_NAME}(?:\s*,\s*{_NAME})+\))\s*=\s*([^=<>]+)")
_RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|neq?|lt|gt|in|leqslant|geqslant)(?![a-z])")


def _without_names(gold: str, answer: str) -> tuple[str, str]:
    """Both without `x =`, where one of them has no name or both have the same one."""
    right, given = _NAMED.fullmatch(gold), _NAMED.fullmatch(answer)
    if right and given:
        if _without_spaces(right[1]) == _without_spaces(given[1]):
            return normalize(right[2]), normalize(given[2])
    elif right and not _RELATION.search(answer):
        return normalize(right[2]), answer
    elif given and not _RELATION.search(gold):
        return gold, normalize(given[2])
    return gold, answer


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True)
class _Number:
    """A number, exactly as it is written.

    Attributes:
        places, digits: of a decimal, behind the point and, without trailing zeros, significant; a
            fraction has 0.
    """

    value: Fraction
    places: int = 0
    digits: int = 0
    is_percent: bool = False


_DECIMAL = r"\d+\.?\d*|\.\d+"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\s*(?:
        \\frac\s*\{{\s*(?P<over>-?\d+)\s*\}}\s*\{{\s*(?P<under>-?\d+)\s*\}}
        | (?P<over_2>\d+)\s*/\s*(?P<under_2>\d+)
        | (?P<decimal>{_DECIMAL})
        | (?P<power>10\s*\^\s*(?:\d|\{{\s*[-+]?\s*\d+\s*\}}))
    )(?P<factors>(?:\s*(?:\\times|\\cdot|\*)\s*(?:10\s*\^\s*(?:-?\d|\{{\s*[-+]?\s*\d+\s*\}})|\d+))*)
    \s*(?P<percent>\\?%)?""",
    re.VERBOSE,
)
_FACTOR = re.compile(r"(\d+)(?:\s*\^\s*\{?\s*([-+]?\s*\d+))?")


def _read_number(text: str) -> _Number | None:
    if len(text) > _MOST_DIGITS or (match := _NUMBER.fullmatch(text.strip())) is None:
        return None
    places = digits = 0
    factor = Fraction(1)
    for base, power in _FACTOR.findall((match["power"] or "") + match["factors"]):
        exponent = int(power.replace(" ", "") or "1")
        if abs(exponent) > _MOST_DIGITS:
            return None
        factor *= Fraction(int(base)) ** exponent
        places -= exponent if power and base == "10" else 0
    over, under = match["over"] or match["over_2"], match["under"] or match["under_2"]
    if over is not None:
        if int(under) == 0:
            return None
        value, places = Fraction(int(over), int(under)), 0
    elif match["decimal"] is not None:
        whole, _, behind = match["decimal"].partition(".")
        value = Fraction(match["decimal"].rstrip(".") if whole else f"0{match['decimal']}")
        places += len(behind)
        digits = len((whole + behind).strip("0"))
    else:
        value, digits = Fraction(1), 1
    value *= factor * (-1 if match["sign"] == "-" else 1)
    return _Number(value, max(places, 0), digits, match["percent"] is not None)


_FEWEST_PLACES = 6  # behind the point, and significant digits, of a decimal that may be rounded
_DOUBLE_DIGITS, _DOUBLE_EPSILON = 15, Fraction(1, 2**52)


def _stands_for(decimal: _Number, exact: Fraction) -> bool:
    """Whether a decimal is the exact value, rounded or cut off at its last digit.

    A decimal of fewer than six places is not meant as an approximation, so 0.333 is not 1/3. A
    binary floating-point number has 15 right digits, whatever it shows.
    """
    if decimal.value == exact:
        return True
    error = abs(decimal.value - exact)
    if decimal.digits >= _DOUBLE_DIGITS and error <= _DOUBLE_EPSILON * abs(exact):
        return True
    if min(decimal.places, decimal.digits) < _FEWEST_PLACES:
        return False
    unit = Fraction(1, 10**decimal.places)
    is_cut = 0 <= (abs(exact) - abs(decimal.value)) < unit and decimal.value * exact > 0
    return is_cut or error <= unit / 2


def _same_number(gold: str, answer: str) -> bool | None:
    """Exactly the same value; a percentage is also its hundredth. None: not both are numbers."""
    right, given = _read_number(gold), _read_number(answer)
    if right is None or given is None:
        return None
    scales = [Fraction(1)]
    if right.is_percent != given.is_percent:
        scales.append(Fraction(1, 100) if right.is_percent else Fraction(100))
    return any(
        _stands_for(given, right.value * scale) or _stands_for(right, given.value / scale)
        for scale in scales
    )


# ---------------------------------------------------------------- choices and words

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[(\[]?\s*([A-H])\s*(?:[)\].:]+(?!\s*(?:[,&/]|and\b|or\b))|$).*",
    re.IGNORECASE,
)
_GOLD_CHOICE = re.compile(r"\(?([A-H])\)?")


def _choice(text: str) -> str | None:
    match = _GOLD_CHOICE.fullmatch(_as_text(text))
    return match and match[1]


def _same_choice(gold: str, answer: str) -> bool | None:
    """The same letter, A to H, whatever follows it. None: they are no choices."""
    right, given = _choice(gold), _CHOICE.fullmatch(_as_text(answer))
    return None if right is None or given is None else right == given[1].upper()


_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_SHORT_WORDS = {"yes", "no", "odd", "all", "one", "two", "six", "ten", "max", "min", "both"}


def _as_text(text: str) -> str:
    return " ".join(TEXT.sub(r"\1", text).split())


def _words(text: str) -> str | None:
    """Words in lower case; None where the letters may be variables."""
    plain = _as_text(text)
    if not _WORDS.fullmatch(plain):
        return None
    is_ranking = plain.isupper() and len(plain) >= 3  # ACB is no product of three variables
    words = plain.casefold().replace("-", " ")
    is_word = is_ranking or " " in words or len(words) >= 4 or words in _SHORT_WORDS
    return words if is_word else None


_FIRST_WORD = re.compile(r"(yes|no|true|false)\s*[,.:;]", re.IGNORECASE)


def _same_words(gold: str, answer: str) -> bool | None:
    """The same words, in lower or upper case. None: not both are words."""
    right, plain = _words(gold), _as_text(answer)
    if right is None:
        return None
    if first := _FIRST_WORD.match(plain):  # the reason behind it does not count
        plain = first[1]
    return right == plain.casefold().replace("-", " ") if _WORDS.fullmatch(plain) else None


# ---------------------------------------------------------------- times and bases

_TIME = re.compile(r"(\d{1,2})\s*:\s*(\d\d)\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_NUMERAL = re.compile(r"(\d[\dA-F]*)\s*_\s*\{?\s*\(?(\d{1,2})\)?\s*\}?")


def _same_time(gold: str, answer: str) -> bool | None:
    """The same time of day; where one lacks am or pm, it is not compared. None: not both are."""
    right, given = (_TIME.fullmatch(_as_text(text)) for text in (gold, answer))
    if right is None or given is None:
        return None
    halves = {match[3].lower() for match in (right, given) if match[3]}
    return (int(right[1]), right[2]) == (int(given[1]), given[2]) and len(halves) < 2


def _same_numeral(gold: str, answer: str) -> bool | None:
    """The same value of numerals that both name their base. None: not both do."""
    found = [_NUMERAL.fullmatch(text) for text in (gold, answer)]
    values = [_numeral_value(*match.groups()) for match in found if match]
    return values[0] == values[1] if len(values) == 2 and None not in values else None


def _numeral_value(digits: str, base: str) -> int | None:
    try:
        return int(digits, int(base))
    except ValueError:  # a digit that the base does not have: an index, no base
        return None


# ---------------------------------------------------------------- lists, tuples, sets

_BRACKETS = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", re.DOTALL)


def _read_list(text: str) -> tuple[str, list[str]] | None:
    """Brackets, `{}` and empty for lists whose order does not count, and parts; None: no list."""
    brackets, inner = "", text
    if (match := _BRACKETS.fullmatch(text)) and _closes_at_end(text):
        brackets, inner = match[1] + match[3], match[2]
    parts = split_list(inner)
    if len(parts) < 2 or not all(parts) or re.search(r"\\mid|[|:]", inner):
        return None
    brackets = {r"\langle\rangle": "()", r"\{\}": "{}"}.get(brackets, brackets)
    if brackets == "[]" and len(parts) > 2:  # no interval
        brackets = "()"
    return brackets, parts


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last one."""
    depth = 0
    for bracket in re.finditer(r"\\[lr]angle|[()\[\]{}]", text):
        depth += 1 if bracket[0] in ("(", "[", "{", r"\langle") else -1
        if depth == 0:
            return bracket.end() == len(text)
    return False


def _same_list(gold: str, answer: str) -> bool | None:
    """The same parts: in order in brackets, which must be alike; in any order in sets and bare.

    A bare list for a tuple must be in its order. None: not both are lists.
    """
    right, given = _read_list(gold), _read_list(answer)
    if right is None or given is None:
        return None
    brackets = {right[0], given[0]}
    if len(right[1]) != len(given[1]) or len(brackets - {""}) > 1:
        return False
    golds, parts = ([normalize(part) for part in found[1]] for found in (right, given))
    if not brackets <= {"", "{}"}:
        if brackets not in ({"()"}, {"", "()"}) and "" in brackets:
            return False  # the ends of an interval, without the interval
        return all(is_right(a, b) for a, b in zip(golds, parts, strict=True))
    for part in parts:
        found = next((n for n, gold in enumerate(golds) if is_right(gold, part)), None)
        if found is None:
            return False
        del golds[found]
    return True


# ---------------------------------------------------------------- what math-verify reads

_PRECISION = 50
_CLOSE, _CLOSE_FLOATS = Fraction(1, 10**30), Fraction(1, 10**13)


def _parse(answer: str) -> list[Any]:
    return list(math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=0))


def _agree(gold: str, found: list[Any]) -> bool:
    """math-verify's verdict, but for constants, whose values decide."""
    right = _parse(gold)
    if right and found and isinstance(right[-1], str) and isinstance(found[-1], str):
        verdict = _same_constant(right[0], found[0], gold, normalize(found[-1]))
        if verdict is not None:
            return verdict
    # math-verify's own limits are off (0): they need SIGALRM, which here ends the process.
    return math_verify.verify(right, found, allow_set_relation_comp=True, timeout_seconds=0)


def _same_constant(gold: Any, answer: Any, gold_text: str, answer_text: str) -> bool | None:
    """The same value to 30 digits, or its decimal. None: not both are constants."""
    right, given = _value(gold), _value(answer)
    if right is None or given is None:
        return None
    has_floats = gold.has(sympy.Float) or answer.has(sympy.Float)
    tolerance = _CLOSE_FLOATS if has_floats else _CLOSE
    largest = max(abs(part) for part in (*right, *given))
    if all(abs(a - b) <= tolerance * largest for a, b in zip(right, given, strict=True)):
        return True
    numbers = ((_read_number(gold_text), given), (_read_number(answer_text), right))
    return any(
        number is not None and number.digits > 0 and not other[1] and _stands_for(number, other[0])
        for number, other in numbers
    )


def _value(expr: Any) -> tuple[Fraction, Fraction] | None:
    """Real and imaginary part of a constant to 50 digits; None for whatever else."""
    if not isinstance(expr, sympy.Expr):
        return None
    expr = expr.xreplace({s: sympy.I for s in expr.free_symbols if str(s) == "i"})
    if expr.free_symbols or not expr.is_number:
        return None
    try:
        parts = expr.evalf(_PRECISION, chop=False).as_real_imag()
        return Fraction(str(parts[0])), Fraction(str(parts[1]))
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return None  # a constant that sympy cannot evaluate, which is for math-verify
