r"""A grading process: is the final answer of a response right?

It is run as a script by `rewards`: it starts in a fraction of a second and imports math-verify, but
neither torch nor the package. It reads one JSON line `[response, answers]` at a time from standard
input and writes one line of JSON: `true` once when it is ready, then `[is right, extracted]` for
each line, where `extracted` is the answer as it was read, or null.

math-verify finds the answer and compares it. Three things it cannot do alone. It reads plain
letters as a product of variables (`18 eggs` as 18 e g g s), cuts the last of them off where they
spell a unit in its list (`2t` becomes 2), and ignores text whatever it says (`5 \text{ million}`
becomes 5). So a boxed answer that is a number and words is rewritten before math-verify sees it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import string
import sys
from collections.abc import Callable

_WORKER_MEMORY_BYTES = 4 * 2**30  # of address space: 9^{9^{9^9}} is refused, not computed

Verdict = tuple[bool, str | None]
"""Whether an answer is right, and the answer as it was read from the response."""


def serve(grade: Callable[[str, list[str]], Verdict], timeout_s: float) -> None:
    """Grade what arrives on standard input until it closes; the body of a worker process.

    The kernel ends the process when grading one line takes longer than `timeout_s`: SIGALRM keeps
    its default action, so no code, in whatever language, can miss it, and a worker whose parent is
    gone does not outlive its line. SIGTERM, which SLURM sends to every process of a preempted job,
    is for the ranks, which still grade the step that they are in.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY_BYTES, _WORKER_MEMORY_BYTES))
    logging.disable()  # math-verify reports every expression it cannot compare
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    replies.write(b"true\n")
    for line in sys.stdin.buffer:
        response, answers = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        verdict = grade(response, answers)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(verdict).encode() + b"\n")


def _serve_math_verify(timeout_s: float) -> None:
    import math_verify

    # math-verify's own limits are off (0): they need SIGALRM, which here ends the process.
    def grade(response: str, answers: list[str]) -> Verdict:
        found = math_verify.parse(rewrite_boxes(response), parsing_timeout=0)
        is_right = any(
            math_verify.verify(
                math_verify.parse(f"\\boxed{{{rewrite_quantity(answer)}}}", parsing_timeout=0),
                found,
                timeout_seconds=0,
            )
            for answer in answers
        )
        return is_right, str(found[-1]) if found else None

    serve(grade, timeout_s)


# ---------------------------------------------------------------- numbers and words

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT_COMMAND = (
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}"
)
_TEXT = re.compile(_TEXT_COMMAND)
# How an answer in LaTeX reads as plain text, in this order.
_PLAIN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_TEXT_COMMAND, r" \1 "),
        (r"\\[dtc]?frac\s*\{([A-Za-z. ]+)\}\s*\{([A-Za-z. ]+)\}", r" \1/\2"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°", " degrees "),
        (r"(?<=\d)(?:\{,\}|\\!?[,!]|,\\!)(?=\d{3})", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|\\q?quad|~", " "),
        (r"\\?\$|[€£¥₹]", ""),
        (r"\\%|\bpercent(?:age)?\b|\bpct\b", "%"),
        ("−", "-"),
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
_UNIT = re.compile(r"(?:\s*+[/·*-]?\s*+[A-Za-z]++(?:\s*+\^-?\d|\s*+\^\{-?\d\}|[²³])?)+[\s.]*")
_UNIT_SUFFIX = re.compile(r"(?<=degrees)\s+[CF]\b|(?<=[a-z])\s+(?:squared|cubed)\b")
_LONGEST_QUANTITY = 200  # characters


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


def rewrite_boxes(response: str) -> str:
    """The response with `rewrite_quantity` applied to all that is boxed."""
    pieces, end = [], 0
    while box := _BOX.search(response, end):
        depth, close = 1, box.end()
        while close < len(response) and depth:
            depth += {"{": 1, "}": -1}.get(response[close], 0)
            close += 1
        if depth:
            break  # a box that was cut
        answer = response[box.end() : close - 1]
        pieces += [response[end : box.end()], rewrite_quantity(answer), "}"]
        end = close
    return "".join([*pieces, response[end:]])


def rewrite_quantity(answer: str) -> str:
    r"""An answer that is a number and words, as math-verify reads it rightly; others as they are.

    Units go (`\$1,800 per day` is 1800) and are not compared; percent stays, which math-verify
    knows. Words that count are numbers (`5 million` is 5 * 1000000), and so are mixed fractions
    (`1 1/2` is 3/2). What else follows the number stays part of the answer.
    """
    if len(answer) > _LONGEST_QUANTITY:
        return answer
    plain = answer
    for pattern, replacement in _PLAIN:
        plain = pattern.sub(replacement, plain)
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
    if not words.strip(" .") or _is_unit(words):
        return number
    if _TEXT.search(answer) and (re.search(r"\d", words) or _NO_UNITS & set(words.split())):
        return plain  # math-verify would ignore it
    if words.strip().isalpha() and not _TEXT.search(answer):
        return f"{number}({words.strip()})"  # math-verify would cut off what looks like a unit
    return answer


def _number(match: re.Match[str]) -> str:
    """The number of a quantity, without separators of thousands."""
    over, under = match["over"] or match["over_2"], match["under"] or match["under_2"]
    if over is None:
        return match["sign"] + match["decimal"].replace(",", "").rstrip(".")
    whole = (match["whole"] or match["whole_2"] or "0").replace(",", "")
    return f"{match['sign']}\\frac{{{int(whole) * int(under) + int(over)}}}{{{under}}}"


def _is_unit(text: str) -> bool:
    """Whether what follows a number is a unit or names what was counted, and nothing more."""
    if text.strip() == "times":  # as an answer to "how many times"
        return True
    if not _UNIT.fullmatch(text):
        return False
    words = re.findall(r"[A-Za-z]+", text)
    is_product = words[0] not in _SHORT_UNITS or (len(words[0]) == 1 and text != words[0])
    if text[0].isalpha() and is_product:  # 2xy
        return False
    is_noun = [_is_noun(word) for word in words]
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


if __name__ == "__main__":
    _serve_math_verify(float(sys.argv[1]))
