"""One row of a prompt source, checked: prompt, acceptable answers, response to imitate."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from trb_megatron.escapes import find_left_over
from trb_megatron.prompts.columns import find_value, missing_column
from trb_megatron.prompts.messages import parse_prompt, parse_text


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
    """

    index: int
    location: str
    prompt: str | list[dict[str, Any]]
    answer: tuple[str, ...] | None
    no_answer: str | None
    response: str | None
    left_over: str | None


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
    answer = no_answer = None
    if columns.answer is not None:
        no_answer = _missing_answer(row, columns.answer, location)
        if no_answer is None:
            value = find_value(row, columns.answer)
            answer = _parse_answers(value, f"{location}: column {columns.answer!r}")
        elif columns.answer in needed:
            raise ValueError(f"{no_answer}; {needed[columns.answer]}")
    prompt = parse_prompt(find_value(row, columns.prompt), f"{location}: column {columns.prompt!r}")
    others = [find_value(row, column) for column in columns[1:] if column is not None]
    left_over = next(filter(None, map(find_left_over, _texts([prompt, *others]))), None)
    return Record(
        index=index,
        location=location,
        prompt=prompt,
        answer=answer,
        no_answer=no_answer,
        response=(
            None
            if columns.response is None
            else parse_text(
                find_value(row, columns.response), f"{location}: column {columns.response!r}"
            )
        ),
        left_over=left_over,
    )


def _texts(value: Any) -> Iterator[str]:
    """All text in a value, that of lists and messages, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))


def _missing_answer(row: dict[str, Any], column: str, location: str) -> str | None:
    """The complaint about a row without an answer: absent, null, blank or an empty list."""
    value = find_value(row, column)
    if value is None:
        return f"{location}: {missing_column(column, row)}"
    if isinstance(value, str) and not value.strip():
        return f"{location}: column {column!r} is empty"
    if value == []:
        return f"{location}: column {column!r} is an empty list of answers"
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
    number = _shortest(value) if isinstance(value, float) else Decimal(value)
    digits = len(number.as_tuple().digits)
    if abs(number.adjusted()) >= _MOST_DIGITS or digits > _MOST_DIGITS:
        raise ValueError(
            f"{location} is a number of more than {_MOST_DIGITS:,} digits; write it as text"
        )
    return f"{number:f}" if number.adjusted() < digits else f"{number:f}.0"


def _shortest(value: float) -> Decimal:
    """The fewest digits that mean this number, of 32 bits where it was stored in so many.

    A column of 32-bit numbers reads 0.1 as 0.10000000149011612: a long number that 32 bits hold
    exactly came from them.
    """
    number = Decimal(repr(value))
    is_long = len(number.as_tuple().digits) >= 15
    if is_long and abs(value) < np.finfo(np.float32).max and float(np.float32(value)) == value:
        return Decimal(str(np.float32(value)))
    return number
