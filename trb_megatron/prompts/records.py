"""One row of a prompt source, checked: prompt, acceptable answers, response to imitate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """

    index: int
    location: str
    prompt: str | list[dict[str, str]]
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
    )


def _parse_text(value: Any, location: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{location} holds {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{location} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{location} is not valid Unicode text") from None
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
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    answer = _parse_text(value, location)
    final = answer.rpartition("####")[2].strip()  # the whole answer where there is no mark
    if not final:
        raise ValueError(f"{location} has nothing after ####")
    return final
