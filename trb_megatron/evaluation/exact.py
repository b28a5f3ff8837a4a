"""Answers that are numbers, times of day or numerals of a base, compared exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from trb_megatron.evaluation.quantities import as_text

_MOST_DIGITS = 4000


@dataclass(frozen=True)
class Number:
    """A number, exactly as it is written.

    Attributes:
        places, digits: of a decimal, behind the point and, without trailing zeros, significant; a
            fraction has 0.
        is_float: it has a point or a power of ten, as a binary floating-point number is written.
    """

    value: Fraction
    places: int = 0
    digits: int = 0
    is_percent: bool = False
    is_float: bool = False


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


def read_number(text: str) -> Number | None:
    r"""The number that a text is, such as -3, 0.5, 1/2, \frac{1}{2}, 5 \times 10^{-3}, 35\%.

    None where it is anything else, or has thousands of digits.
    """
    if len(text) > _MOST_DIGITS or (match := _NUMBER.fullmatch(text.strip())) is None:
        return None
    places = digits = 0
    is_float = False
    factor = Fraction(1)
    for base, power in _FACTOR.findall((match["power"] or "") + match["factors"]):
        exponent = int(power.replace(" ", "") or "1")
        if abs(exponent) > _MOST_DIGITS:
            return None
        factor *= Fraction(int(base)) ** exponent
        if power and base == "10":
            places, is_float = places - exponent, True
    over, under = match["over"] or match["over_2"], match["under"] or match["under_2"]
    if over is not None:
        if int(under) == 0:
            return None
        value, places = Fraction(int(over), int(under)), 0
    elif match["decimal"] is not None:
        whole, _, behind = match["decimal"].partition(".")
        value = Fraction(match["decimal"].rstrip(".") if whole else f"0{match['decimal']}")
        places, is_float = places + len(behind), is_float or "." in match["decimal"]
        digits = len((whole + behind).strip("0"))
    else:
        value, digits = Fraction(1), 1
    value *= factor * (-1 if match["sign"] == "-" else 1)
    return Number(value, max(places, 0), digits, match["percent"] is not None, is_float)


_FEWEST_PLACES = 6  # behind the point, and significant digits, of a decimal that may be rounded
_DOUBLE_DIGITS, _DOUBLE_EPSILON = 15, Fraction(1, 2**52)


def stands_for(decimal: Number, exact: Fraction) -> bool:
    """Whether a decimal is the exact value, rounded or cut off at its last digit.

    A decimal of fewer than six places is not meant as an approximation, so 0.333 is not 1/3. A
    binary floating-point number has 15 right digits, whatever it shows; an integer has all of them.
    """
    if decimal.value == exact:
        return True
    error = abs(decimal.value - exact)
    is_double = decimal.is_float and decimal.digits >= _DOUBLE_DIGITS
    if is_double and error <= _DOUBLE_EPSILON * abs(exact):
        return True
    if min(decimal.places, decimal.digits) < _FEWEST_PLACES:
        return False
    unit = Fraction(1, 10**decimal.places)
    is_cut = 0 <= (abs(exact) - abs(decimal.value)) < unit and decimal.value * exact > 0
    return is_cut or error <= unit / 2


def same_number(gold: str, answer: str) -> bool | None:
    """Exactly the same value; a percentage is also its hundredth. None: not both are numbers."""
    right, given = read_number(gold), read_number(answer)
    if right is None or given is None:
        return None
    scales = [Fraction(1)]
    if right.is_percent != given.is_percent:
        scales.append(Fraction(1, 100) if right.is_percent else Fraction(100))
    return any(
        stands_for(given, right.value * scale) or stands_for(right, given.value / scale)
        for scale in scales
    )


# ---------------------------------------------------------------- times and bases

_TIME = re.compile(r"(\d{1,2})\s*:\s*(\d\d)\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
_BASES |= {"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16}
_NUMERAL = re.compile(
    rf"""\(?\s*(\d[\dA-F]*)\s*\)?\s*
    (?:(?:_\s*\{{?\s*\(?\s*(?:base\s+)?|[,(]?\s*(?:in\s+)?base[\s-])\s*
    (\d{{1,2}}|{"|".join(_BASES)})\s*\)?\s*\}}?\s*\)?)?""",
    re.VERBOSE,
)


def same_time(gold: str, answer: str) -> bool | None:
    """The same time of day; where one lacks am or pm, it is not compared. None: not both are."""
    right, given = (_TIME.fullmatch(as_text(text)) for text in (gold, answer))
    if right is None or given is None:
        return None
    halves = {match[3].lower() for match in (right, given) if match[3]}
    return (int(right[1]), right[2]) == (int(given[1]), given[2]) and len(halves) < 2


def same_numeral(gold: str, answer: str) -> bool | None:
    """The same value of numerals of a base, which both name, or the same digits where one does.

    None: neither names a base, or one is no numeral.
    """
    right, given = (_NUMERAL.fullmatch(as_text(text)) for text in (gold, answer))
    if right is None or given is None or not (right[2] or given[2]):
        return None
    if not (right[2] and given[2]):
        return right[1] == given[1]
    values = [_numeral_value(*match.groups()) for match in (right, given)]
    return None if None in values else values[0] == values[1]


def _numeral_value(digits: str, base: str) -> int | None:
    try:
        return int(digits, _BASES.get(base) or int(base))
    except ValueError:  # a digit that the base does not have: an index, no base
        return None
