"""One row of a prompt source, checked: prompt, acceptable answers, response to imitate."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from trb_megatron.escapes import find_left_over
from trb_megatron.prompts.columns import ROW_OPTIONS, find_value, missing_column
from trb_megatron.prompts.floats import UnclearNumber
from trb_megatron.prompts.messages import parse_prompt, parse_text
from trb_megatron.prompts.readers import parse_json


class Columns(NamedTuple):
    """Where a row holds what, dots leading into columns; a column that is not read is None."""

    prompt: str
    answer: str | None
    response: str | None


@dataclass(frozen=True)
class Record:
    """The text of one row, and where it stands for error messages.

    Attributes:
        answer: the acceptable answers; None where the row has none, or none is read.
        no_answer: the complaint about a row that has none in the column that is read.
        left_over: what in the row looks like LaTeX without its backslash.
        options: those of `ROW_OPTIONS` in which the row has a value.
    """

    index: int
    location: str
    prompt: str | list[dict[str, Any]]
    answer: tuple[str, ...] | None
    no_answer: str | None
    response: str | None
    left_over: str | None
    options: tuple[str, ...]


def parse_record(
    index: int, location: str, row: Any, columns: Columns, needed: Mapping[str, str]
) -> Record:
    """Check a row; `location` names it in errors.

    `needed` names the columns in which it must have a value, and what to do where it has none.

    Raises:
        ValueError: names the row, and the column that cannot be used.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{location}: expected an object with the column {columns.prompt!r}")
    for column, fix in needed.items():
        if find_value(row, column) is None:
            raise ValueError(f"{location}: {missing_column(column, row)}; {fix}")
    answers = answer = no_answer = None
    if columns.answer is not None:
        place = f"{location}: column {columns.answer!r}"
        answers = _read_spelled(find_value(row, columns.answer), place)
        no_answer = _missing_answer(answers, place)
        if answers is None:
            no_answer = f"{location}: {missing_column(columns.answer, row)}"
        if no_answer is None:
            answer = _parse_answers(answers, place)
        elif columns.answer in needed:
            raise ValueError(f"{no_answer}; {needed[columns.answer]}")
    prompt = parse_prompt(find_value(row, columns.prompt), f"{location}: column {columns.prompt!r}")
    response = None if columns.response is None else find_value(row, columns.response)
    texts = _texts([prompt, answers, response])
    left_over = next(filter(None, map(find_left_over, texts)), None)
    return Record(
        index=index,
        location=location,
        prompt=prompt,
        answer=answer,
        no_answer=no_answer,
        response=(
            None
            if columns.response is None
            else parse_text(response, f"{location}: column {columns.response!r}")
        ),
        left_over=left_over,
        options=tuple(n for n in ROW_OPTIONS if n not in columns and _has_value(row.get(n))),
    )


def _has_value(value: Any) -> bool:
    """Whether there is something in a value, which may be spelled; null and nan are nothing."""
    if isinstance(value, dict):
        return any(_has_value(part) for part in value.values())
    return value is not None and value not in ("", "[]", "{}", "null", "None", "nan", [])


def _texts(value: Any) -> Iterator[str]:
    """All text in a value, that of lists and messages, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))


# Text that spells a list with a text in it, or an empty one; [1, 2] is an interval.
_SPELLED_LIST = re.compile(r"""\s*\[(?:\s*|\s*'.*|[^"]*".*)\]\s*""", re.DOTALL)


def _read_spelled(value: Any, location: str) -> Any:
    """The list of answers that a text spells in JSON; any other value is the answer itself."""
    if not isinstance(value, str) or not _SPELLED_LIST.fullmatch(value):
        return value
    try:
        return parse_json(value, f"{location} looks like a list of answers, but is")
    except ValueError as error:
        raise ValueError(
            f'{error}; write the list in JSON, such as ["5", "five"], or put a text that is the '
            "answer as it stands into a list"
        ) from None


def _missing_answer(value: Any, location: str) -> str | None:
    """The complaint about a value that is no answer: blank or an empty list."""
    if isinstance(value, str) and not value.strip():
        return f"{location} is empty"
    if value == []:
        return f"{location} is an empty list of answers"
    return None


def _parse_answers(value: Any, location: str) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_parse_answer(answer, location) for answer in value)
    return (_parse_answer(value, location),)


def _parse_answer(value: Any, location: str) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{location} holds {value}, which is no answer (often a missing value); write the "
            "answer, or leave the row out"
        )
    if isinstance(value, UnclearNumber):
        raise ValueError(
            f"{location} holds {value.exact:.0f} in {value.bits} bits, which are those of "
            f"{value.shortest:.0f}, too; store the column as whole numbers, in 64 bits or as text"
        )
    if isinstance(value, bool):
        raise ValueError(
            f"{location} holds a boolean, for which a response may use many words; write those "
            'that are right as text, such as ["yes", "true"]'
        )
    if isinstance(value, int | float | Decimal):
        return _write_number(value, location)
    answer = parse_text(value, location)
    final = answer.rpartition("####")[2].strip()  # the whole answer where there is no mark
    if not final:
        raise ValueError(f"{location} has nothing after ####")
    return final


_MOST_DIGITS = 1000  # of a number that is no text; more are a mistake, or fill the memory


def _write_number(value: int | float | Decimal, location: str) -> str:
    """The number without an exponent, which `str` would write and a grader read as e times x.

    Where there was one, a whole number keeps a point: 1e16 may be rounded, as no integer is.

    Raises:
        ValueError: it has more than `_MOST_DIGITS` digits.
    """
    number = Decimal(repr(value) if isinstance(value, float) else value)
    digits = len(number.as_tuple().digits)
    if abs(number.adjusted()) >= _MOST_DIGITS or digits > _MOST_DIGITS:
        raise ValueError(
            f"{location} is a number of more than {_MOST_DIGITS:,} digits; write it as text"
        )
    return f"{number:f}" if number.adjusted() < digits else f"{number:f}.0"
