r"""Whether an answer equals the right one: numbers, choices, words and lists by rule, the rest by
math-verify.

math-verify compares numbers to six places, so that 1e-9 equals 2e-9; it compares words as products
of their letters, so that ACB equals CAB; it takes a pair for a set, and 1:2:3 for 1/2/3. These are
compared here.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import math_verify
import sympy

from trb_megatron.evaluation.exact import (
    read_number,
    same_number,
    same_numeral,
    same_time,
    stands_for,
)
from trb_megatron.evaluation.final_answer import find_answer, stated_answer
from trb_megatron.evaluation.notation import (
    one_spelling,
    plain_characters,
    split_list,
    unwrap,
    write_out_signs,
)
from trb_megatron.evaluation.quantities import TEXT, as_text, rewrite_quantity

_LONGEST = 2000  # characters of an answer that rules look at; math-verify alone gets longer ones
_BOLD = re.compile(r"(?<!\w)\*\*(.+?)\*\*(?!\w)")


def grade(response: str, answers: list[str]) -> tuple[bool, str | None]:
    """Whether the final answer of a response is one of the right ones, and the answer as read."""
    found = find_answer(response)
    if found is None:
        return False, None
    if found.is_marked:
        answer = normalize(found.text)
        return any(is_right(right_answer(gold), answer) for gold in answers), answer
    text = _BOLD.sub(r"\1", found.text.replace("`", " "))
    parsed = math_verify.parse(text, parsing_timeout=0)
    stated = normalize(stated_answer(found.text))
    read = str(parsed[-1]) if parsed else None
    for gold in map(right_answer, answers):
        if _choice(gold) or _words(gold):
            read = stated or None
            if is_right(gold, stated):
                return True, read
        elif parsed and is_right(gold, normalize(str(parsed[-1]))):
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
    return write_out_signs(unwrap(rewrite_quantity(one_spelling(unwrap(answer)))))


def is_right(gold: str, answer: str) -> bool:
    """Whether two normalized answers are the same."""
    if not answer or not gold:
        return False
    if _without_spaces(as_text(gold)) == _without_spaces(as_text(answer)):
        return True  # \text{July } 19 is July 19
    if _BARE_RELATION.match(answer) and not _RELATION.search(gold):
        return False  # math-verify reads 14 from \neq 14
    gold, answer = _without_names(_only_element(gold), _only_element(answer))
    for rule in _RULES:
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    return _agree(gold, _parse(answer))


def _without_spaces(text: str) -> str:
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # but 2 1/3 is not 21/3


_NAME = r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'?"
_NAMES = rf"{_NAME}(?:\s*:\s*{_NAME})*|\\angle\s*[A-Z]+|\({_NAME}(?:\s*,\s*{_NAME})+\)"
_NAMED = re.compile(rf"({_NAMES})\s*=\s*([^=<>]+)")
_RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|neq?|lt|gt|in|leqslant|geqslant)(?![a-z])")

_BARE_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|neq?|lt|gt|not|leqslant|geqslant)(?![a-z])")


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


# ---------------------------------------------------------------- choices and words

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?[(\[]?\s*([A-H])\s*(?:[)\].:]+(?!\s*(?:[,&/]|and\b|or\b))|$).*",
    re.IGNORECASE,
)
_GOLD_CHOICE = re.compile(r"\(?([A-H])\)?")


def _choice(text: str) -> str | None:
    match = _GOLD_CHOICE.fullmatch(as_text(text))
    return match and match[1]


def _same_choice(gold: str, answer: str) -> bool | None:
    """The same letter, A to H, whatever follows it. None: they are no choices."""
    right, given = _choice(gold), _CHOICE.fullmatch(as_text(answer))
    return None if right is None or given is None else right == given[1].upper()


_CHOICES = re.compile(r"\(?[A-H]\)?(?:\s*,?\s*\(?[A-H]\)?)+")


def _same_choices(gold: str, answer: str) -> bool | None:
    """Several letters, with commas in one of them alone: B, D is BD. None: something else."""
    texts = [as_text(gold), as_text(answer)]
    if sum("," in text for text in texts) != 1 or not all(map(_CHOICES.fullmatch, texts)):
        return None
    letters = [sorted(re.findall("[A-H]", text)) for text in texts]
    return letters[0] == letters[1]


_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_SHORT_WORDS = {"yes", "no", "odd", "all", "one", "two", "six", "ten", "max", "min", "both"}


def _words(text: str) -> str | None:
    """Words as they are compared; None where the letters may be variables."""
    plain, outside = as_text(text), TEXT.sub("", text)
    is_mixed = outside != text and re.search("[A-Za-z]", outside)  # x \text{ cm}
    if is_mixed or not _WORDS.fullmatch(plain):
        return None
    is_ranking = plain.isupper() and len(plain) >= 3  # ACB is no product of three variables
    is_word = is_ranking or " " in plain or len(plain) >= 4 or plain.casefold() in _SHORT_WORDS
    return _one_case(plain) if is_word else None


_ARTICLE = re.compile(r"(?:an?|the) (?=\w\w)")  # A B may be two choices


def _one_case(words: str) -> str:
    return _ARTICLE.sub("", words.casefold().replace("-", " "), count=1).removesuffix("s")


_FIRST_WORD = re.compile(r"(yes|no|true|false)\s*[,.:;]", re.IGNORECASE)


def _same_words(gold: str, answer: str) -> bool | None:
    """The same words, in lower or upper case. None: not both are words."""
    right, plain = _words(gold), as_text(answer).rstrip("!?. ")
    if right is None:
        return None
    if first := _FIRST_WORD.match(plain):  # the reason behind it does not count
        plain = first[1]
    return right == _one_case(plain) if _WORDS.fullmatch(plain) else None


# ---------------------------------------------------------------- lists, tuples, sets

_CONDITION = re.compile(r"\\mid|[|:]")  # of a set that is described, not listed
_BRACKETS = re.compile(r"(\(|\[|\\\{|\\langle)(.*)(\)|\]|\\\}|\\rangle)", re.DOTALL)


def _read_list(text: str) -> tuple[str, list[str]] | None:
    """Brackets, `{}` and empty for lists whose order does not count, and parts; None: no list."""
    brackets, inner = "", text
    if (match := _BRACKETS.fullmatch(text)) and _closes_at_end(text):
        brackets, inner = match[1] + match[3], match[2]
    parts = split_list(inner)
    is_set = brackets == r"\{\}"
    if len(parts) < 2 or not all(parts) or (is_set and _CONDITION.search(inner)):
        return None
    if is_set:
        parts = list(dict.fromkeys(parts))
    brackets = {r"\langle\rangle": "()", r"\{\}": "{}"}.get(brackets, brackets)
    if brackets == "[]" and len(parts) > 2:  # no interval
        brackets = "()"
    return brackets, parts


def _only_element(text: str) -> str:
    """The element of a set that has but one; other text as it is."""
    match = _BRACKETS.fullmatch(text)
    if match is None or match[1] + match[3] != r"\{\}" or not _closes_at_end(text):
        return text
    is_one = len(split_list(match[2])) == 1 and not _CONDITION.search(match[2])
    return match[2].strip() if is_one and match[2].strip() else text


_VECTOR = re.compile(r"\\begin\{([pb]?matrix)\}((?:(?!\\begin|&.*\\\\|\\\\.*&).)*)\\end\{\1\}")


def _same_vector(gold: str, answer: str) -> bool | None:
    """A matrix of one row or column for a tuple. None: not one of either."""
    texts = []
    for text in (gold, answer):
        if vector := _VECTOR.fullmatch(text):
            parts = re.split(r"&|\\\\", vector[2].strip().removesuffix(r"\\"))
            text = f"({','.join(parts)})"
        texts.append(text)
    is_one = (texts[0] != gold) != (texts[1] != answer)
    return _same_list(*texts) if is_one else None


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


_NO_RATIO = re.compile(r"[=<>,|]|\\(?:text|math|mid|in)|(?<![\\A-Za-z])[A-Za-z]{3}")


def _same_ratio(gold: str, answer: str) -> bool | None:
    """Parts in the same proportion, of which one has three or more. None: neither has.

    math-verify reads 1:2:3 as 1/2/3, which is 1/3/2 as well.
    """
    right, given = _ratio(gold), _ratio(answer)
    if max(len(right), len(given)) < 3:
        return None
    known = next((n for n, part in enumerate(right) if not is_right("0", normalize(part))), None)
    if len(right) != len(given) or known is None:
        return False
    shares = (
        [normalize(rf"\frac{{{p}}}{{{parts[known]}}}") for p in parts] for parts in (right, given)
    )
    return all(is_right(a, b) for a, b in zip(*shares, strict=True))


def _ratio(text: str) -> list[str]:
    """What stands between colons; nothing where that is more than numbers and variables."""
    if (match := _BRACKETS.fullmatch(text)) and _closes_at_end(text):
        text = match[2]
    return [] if _NO_RATIO.search(text) else split_list(text, ":")


# ---------------------------------------------------------------- what math-verify reads

_PRECISION, _MOST_PRECISION = 50, 10_000  # digits
_GUARD = 20  # digits that terms which cancel may cost
_CLOSE_FLOATS = Fraction(1, 10**13)


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
    r"""The same value, or its decimal. None: not both are constants.

    The same to 30 digits and those of the largest and smallest terms: 2^{2024} is not 2^{2024} - 1,
    and 1 - 2^{-2024} not 1.
    """
    right, given = _constant(gold), _constant(answer)
    if right is None or given is None:
        return None
    try:
        precision = min(_PRECISION + max(_size(right), _size(given)), _MOST_PRECISION)
        right, given = _value(right, precision), _value(given, precision)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return None  # what sympy cannot evaluate, which is for math-verify
    has_floats = gold.has(sympy.Float) or answer.has(sympy.Float)
    tolerance = _CLOSE_FLOATS if has_floats else Fraction(10) ** (_GUARD - precision)
    largest = max(abs(part) for part in (*right, *given))
    if all(abs(a - b) <= tolerance * largest for a, b in zip(right, given, strict=True)):
        return True
    numbers = ((read_number(gold_text), given), (read_number(answer_text), right))
    return any(
        number is not None and number.digits > 0 and not other[1] and stands_for(number, other[0])
        for number, other in numbers
    )


def _constant(expr: Any) -> sympy.Expr | None:
    """The expression with i as the imaginary unit; None where it is no number."""
    if not isinstance(expr, sympy.Expr):
        return None
    expr = expr.xreplace({s: sympy.I for s in expr.free_symbols if str(s) == "i"})
    return None if expr.free_symbols or not expr.is_number else expr


def _size(constant: sympy.Expr) -> int:
    """Digits before and behind the point that the terms of a constant take, at most."""
    sizes = (
        abs(term.evalf(5))
        for term in sympy.preorder_traversal(constant)
        if isinstance(term, sympy.Rational | sympy.Pow | sympy.Function) and term.is_number
    )
    logs = (abs(sympy.log(size, 10)) for size in sizes if size.is_Float and size > 0)
    return int(sum(map(float, logs)))


def _value(constant: sympy.Expr, precision: int) -> tuple[Fraction, Fraction]:
    """Real and imaginary part, to so many digits."""
    parts = constant.evalf(precision, maxn=2 * precision, chop=False).as_real_imag()
    real, imaginary = (sympy.Rational(part) for part in parts)
    return Fraction(real.p, real.q), Fraction(imaginary.p, imaginary.q)


_RULES = (
    _same_ratio,
    same_number,
    _same_choice,
    _same_choices,
    _same_words,
    same_time,
    same_numeral,
    _same_vector,
    _same_list,
)
