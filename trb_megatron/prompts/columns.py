"""Columns of a row by their names; a dot leads into a column that holds an object."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MOST_NAMES = 30

ROW_OPTIONS = ("tools", "chat_template_kwargs")
"""Columns with which TRL renders the prompt of a row. Here they are noticed, not used."""


def find_value(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, such as `answer` or `reward_model.ground_truth`; None: it has none.

    A column whose own name holds the dots comes first.
    """
    if name in row:
        return row[name]
    for head, rest in _cuts(name):
        inner = row.get(head)
        if isinstance(inner, Mapping) and (value := find_value(inner, rest)) is not None:
            return value
    return None


def outer_columns(names: Iterable[str], present: Iterable[str]) -> list[str]:
    """The columns of a table, out of those present, that hold all of `names`; each once."""
    there = set(present)
    found: dict[str, None] = {}
    for name in names:
        heads = [name] if name in there else [head for head, _ in _cuts(name)]
        found |= {head: None for head in heads if head in there}
    return list(found)


def missing_column(name: str, row: Mapping[str, Any]) -> str:
    """The complaint about a row, or a table's columns, without a value in a column."""
    names = list(_full_names(row))
    shown = [repr(known) for known in names[:_MOST_NAMES]]
    if len(names) > _MOST_NAMES:
        shown.append(f"{len(names) - _MOST_NAMES} more")
    return f"no value in the column {name!r}; the columns are {', '.join(shown) or 'none'}"


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for cut in range(1, len(parts)):
        yield ".".join(parts[:cut]), ".".join(parts[cut:])


def _full_names(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in _full_names(value))
        else:
            yield name
