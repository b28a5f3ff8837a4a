"""One row of a prompt source, checked: prompt, acceptable answers, response to imitate."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from trb_megatron.escapes import find_control, find_left_over
from trb_megatron.prompts.readers import missing_column


class Columns(NamedTuple):
    """Where a row holds what; a column that is not read is None."""

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
    prompt: str | list[dict[str, str]]
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
    prompt_column, answer_column, response_column = columns
    if not isinstance(row, dict):
        raise ValueError(f"{location}: expected an object with the column {prompt_column!r}")
    for column, fix in needed.items():
        if row.get(column) is None:
            raise ValueError(f"{location}: {missing_column(column, list(row))}; {fix}")
    answer = no_answer = None
    if answer_column is not None:
        no_answer = _missing_answer(row, answer_column, location)
        if no_answer is None:
            answer = _parse_answers(row[answer_column], f"{location}: column {answer_column!r}")
        elif answer_column in needed:
            raise ValueError(f"{no_answer}; {needed[answer_column]}")
    return Record(
        index=index,
        location=location,
        prompt=_parse_prompt(row[prompt_column], f"{location}: column {prompt_column!r}"),
        answer=answer,
        no_answer=no_answer,
        response=(
            None
            if response_column is None
            else _parse_text(row[response_column], f"{location}: column {response_column!r}")
        ),
        left_over=next(
            filter(None, map(find_left_over, _texts([row.get(column) for column in columns]))), None
        ),
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


def _parse_text(value: Any, location: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{location} holds {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{location} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{location} is not valid Unicode text") from None
    if found := find_control(value):
        raise ValueError(f"{location} holds {found}")
    return value


def _parse_prompt(value: Any, location: str) -> str | list[dict[str, str]]:
    if not isinstance(value, list):
        return _parse_text(value, location)
    if not value:
        raise ValueError(f"{location} is an empty list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{location}: a chat message needs a role and content")
        _parse_text(message.get("content"), f"{location}: a message's content")
    return value


def _missing_answer(row: dict[str, Any], column: str, location: str) -> str | None:
    """The complaint about a row without an answer: absent, null, NaN, blank or an empty list."""
    value = row.get(column)
    if value is None or value != value:
        return f"{location}: {missing_column(column, list(row))}"
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
    if isinstance(value, bool):
        raise ValueError(
            f"{location} holds a boolean, for which a response may use many words; write those "
            'that are right as text, such as ["yes", "true"]'
        )
    if isinstance(value, int | float | Decimal):
        return _write_number(value, location)
    answer = _parse_text(value, location)
    final = answer.rpartition("####")[2].strip()  # the whole answer where there is no mark
    if not final:
        raise ValueError(f"{location} has nothing after ####")
    return final


_MOST_DIGITS = 1000  # of a number that is no text; more are a mistake, or fill the memory


def _write_number(value: int | float | Decimal, location: str) -> str:
    """The number without an exponent, which `str` would write and a grader read as e times x.

    Raises:
        ValueError: it has more than `_MOST_DIGITS` digits.
    """
    number = _shortest(value) if isinstance(value, float) else Decimal(value)
    if not number.is_finite():
        raise ValueError(f"{location} is {number}, which is no number")
    if abs(number.adjusted()) >= _MOST_DIGITS or len(number.as_tuple().digits) > _MOST_DIGITS:
        raise ValueError(
            f"{location} is a number of more than {_MOST_DIGITS:,} digits; write it as text"
        )
    return f"{number:f}"


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
