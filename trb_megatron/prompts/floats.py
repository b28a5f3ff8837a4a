"""Floating-point columns: numbers of 16 and 32 bits by the digits that mean them.

Read as 64 bits, a 0.1 of 32 bits is 0.10000000149011612. The type of the column says its width; a
value does not: 2^50 fits 32 bits, too. Of whole numbers that few digits cannot tell apart, which 32
bits have above 2^24, nobody knows which one was meant.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow

_NUMPY_TYPES: dict[pyarrow.DataType, type[np.floating[Any]]] = {
    pyarrow.float16(): np.float16,
    pyarrow.float32(): np.float32,
}

Shorten = Callable[[Any], Any]


@dataclass(frozen=True)
class UnclearNumber:
    """A whole number whose bits hold others, too, one of them of fewer digits."""

    exact: float
    shortest: float
    bits: int


def shorten_columns(schema: Iterable[pyarrow.Field]) -> Shorten | None:
    """How to shorten the numbers in rows of a table, at any depth; None: it has none to shorten.

    A number becomes the one of 64 bits with the fewest digits that is it in the column's bits; a
    whole number that is then another one becomes an `UnclearNumber`.
    """
    columns = {field.name: shorten for field in schema if (shorten := _shorten(field.type))}
    if not columns:
        return None

    def shorten_row(row: dict[str, Any]) -> dict[str, Any]:
        return {name: columns.get(name, _keep)(value) for name, value in row.items()}

    return shorten_row


def _shorten(kind: pyarrow.DataType) -> Shorten | None:
    """How to shorten a value of this type; None: there is nothing to shorten in it."""
    if (narrow := _NUMPY_TYPES.get(kind)) is not None:
        return lambda value: None if value is None else _shortest(value, narrow)
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _shorten(kind.value_type)
    if types.is_struct(kind):
        of_struct = shorten_columns(kind)
        return of_struct and (lambda value: None if value is None else of_struct(value))
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_list and (of_element := _shorten(kind.value_type)):
        return lambda value: None if value is None else [of_element(element) for element in value]
    return None


def _shortest(value: float, narrow: type[np.floating[Any]]) -> float | UnclearNumber:
    shortest = float(str(narrow(value)))
    if value.is_integer() and shortest != value:
        return UnclearNumber(value, shortest, np.finfo(narrow).bits)
    return shortest


def _keep(value: Any) -> Any:
    return value
