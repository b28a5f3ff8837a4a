"""One row of a prompt source, checked: prompt, acceptable answers, response to imitate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """

    index: int
    location: str
    prompt: str | list[dict[str, Any]]
    answer: tuple[str, ...] | None
    no_answer: str | None
    response: str | None


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
    return Record(
        index=index,
        location=location,
        prompt=parse_prompt(
            find_value(row, columns.prompt), f"{location}: column {columns.prompt!r}"
        ),
        answer=answer,
        no_answer=no_answer,
        response=(
            None
            if columns.response is None
            else parse_text(
                find_value(row, columns.response), f"{location}: column {columns.response!r}"
            )
        ),
    )


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
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    answer = parse_text(value, location)
    final = answer.rpartition("####")[2].strip()  # the whole answer where there is no mark
    if not final:
        raise ValueError(f"{location} has nothing after ####")
    return final
