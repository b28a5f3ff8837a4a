r"""Where a response gives its final answer: behind its thinking, in its last box or tag."""

from __future__ import annotations

import re
from typing import NamedTuple

from trb_megatron.evaluation.notation import closing_brace, plain_characters, unwrap

_THINKING = re.compile(r"[<\[](/?)(?:think|thinking|thought|reasoning)[>\]]", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(\{)?")
_BARE = re.compile(r"-?[\d.,/]*\d|[a-zA-Z](?![a-zA-Z])")  # TeX boxes one token: \boxed 5
_TAG = re.compile(r"<answer>(?:(.*?)(</answer>)|(?!.*<answer>))", re.IGNORECASE | re.DOTALL)
_MARK = re.compile(r"(?:\A|\n)\s*####(?!#)\s*([^\n]+?)\s*\Z")
# Between the boxes of a list stands only what joins them, such as `$ and $x_2 = `.
_JOINED = re.compile(
    r"(?:\s|[,;&$*]|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{|\}|(?:and|or)\b"
    r"|[a-zA-Z](?:_\{?\w+\}?)?\s*=)*+"
)
_JOINT = re.compile(r"[,;&]|\b(?:and|or)\b")
_STATED = re.compile(
    r"(?i)\b(?:answer|option|choice)\s*(?:is|:|=)\s*:?\s*(?!.*\b(?:answer|option|choice)\s*(?:is|:|=))"
    r"(.+?)(?:[.!?](?=\s|$)|\n|\s(?:because|since|as)\b|$)",
    re.DOTALL,
)
_LONGEST_BARE_ANSWER = 40  # characters of a response that is nothing but its answer


class FinalAnswer(NamedTuple):
    """Text that is the answer alone, or (`is_marked` false) a response that has it somewhere."""

    text: str
    is_marked: bool


def find_answer(response: str) -> FinalAnswer | None:
    r"""The final answer of a response; None: it gives none.

    In this order: what follows the thinking, of that the last `<answer>`, of that the last
    `\boxed{}` or `\fbox{}`, else a last line `#### answer`. Boxes that are joined by no more than
    `and`, `or` or a comma are a list. A last box that is empty or was cut off is no answer, and
    neither is thinking that does not end.
    """
    text = plain_characters(response)
    if tags := list(_THINKING.finditer(text)):
        if not tags[-1][1]:
            return None
        text = text[tags[-1].end() :]
    is_marked = False
    for tag in _TAG.finditer(text):
        if tag[2] is None:
            return None
        answer, is_marked = tag[1], True
    if is_marked:
        text = answer
    if _BOX.search(text):
        text, is_marked = _boxed(text), True
    elif not is_marked and (mark := _MARK.search(text)):
        text, is_marked = mark[1], True
    has_answer = unwrap(" ".join(text.split())) if is_marked else text.strip()
    return FinalAnswer(text, is_marked) if has_answer else None


def stated_answer(text: str) -> str:
    """What an unmarked response says behind `the answer is`; all of it where it is that short.

    For answers that are words, which math-verify does not look for.
    """
    text = text.replace("*", "").strip()
    if match := _STATED.search(text):
        return match[1].strip()
    is_short = len(text) <= _LONGEST_BARE_ANSWER and "\n" not in text
    return text if is_short else ""


def _boxed(text: str) -> str:
    """The last box, or the last ones where they are a list; empty where it was cut off."""
    boxes: list[tuple[int, int, str]] = []  # first and last place, content
    place = 0
    while box := _BOX.search(text, place):
        if box[1] is None:
            bare = _BARE.match(text, box.end())
            place = box.end() if bare is None else bare.end()
            boxes.append((box.start(), place, "" if bare is None else bare[0]))
            continue
        close = closing_brace(text, box.end() - 1)
        if close is None:
            return ""
        place = close + 1
        boxes.append((box.start(), place, text[box.end() : close].strip()))
    answers = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[end:start]
        if not (_JOINED.fullmatch(between) and _JOINT.search(between)):
            break
        if not content or not answers[0]:
            break
        if content not in answers:
            answers.insert(0, content)
    return ",".join(answers)
