"""Rows of the files of a prompt source: JSON Lines, a JSON array, CSV, parquet, a saved dataset.

Whatever is wrong with a file is said with its line or row.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from trb_megatron.file_checks import GIT_LFS_HEAD, RepeatedKeyError, unique_keys
from trb_megatron.prompts.columns import (
    ROW_OPTIONS,
    find_value,
    missing_column,
    outer_columns,
)
from trb_megatron.prompts.floats import shorten_columns
from trb_megatron.prompts.labels import declared_features, with_names


def read_rows(
    path: Path, format: str, needed: Mapping[str, str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (location for error messages, row) in a file's order.

    Args:
        path: of a file, gzip'd or compressed by zstd where it is text; with the format "hf", of the
            folder of a saved dataset.
        needed: columns that a file with a table of columns must have, and what to do where it has
            them not.
        optional: columns to read as well, where they are; so are those of `ROW_OPTIONS`.
    """
    readers = {
        "jsonl": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "hf": _read_hf_dataset,
    }
    return readers[format](path, needed, optional)


# ---------------------------------------------------------------- text

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CODECS = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, one to skip
}


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed where its content, whatever its name, is compressed."""
    with path.open("rb") as file:
        head = file.peek(64)
        _refuse_pointer(path, head)
        codec = next((name for name, magic in _CODECS.items() if magic.match(head)), None)
        if codec is None:
            yield file
            return
        try:
            yield io.BufferedReader(pyarrow.CompressedInputStream(file, codec))
        except OSError as error:
            raise ValueError(f"{path}: cannot be decompressed ({codec}): {error}") from error


def _refuse_pointer(path: Path, head: bytes) -> None:
    if head.startswith(GIT_LFS_HEAD):
        raise ValueError(f"{path}: is a Git-LFS pointer, not the data; fetch it by `git lfs pull`")


def _decode(content: bytes, location: str) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError:
        hint = ": it is UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"{location}: not valid UTF-8{hint}; save the file as UTF-8") from None


# ---------------------------------------------------------------- JSON


def _read_json(
    path: Path, needed: Mapping[str, str], optional: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        head = file.peek(1024).removeprefix(_BYTE_ORDER_MARK)  # type: ignore[attr-defined]
        if head.lstrip().startswith(b"["):
            yield from _read_json_array(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            location = f"{path}:{number}"
            if line.strip():
                yield location, parse_json(_decode(line, location), location)


def _read_json_array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not valid UTF-8; save the file as UTF-8") from None
    try:
        yield from _entries(path, text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The entries of an array, one by one, so that an error can say which."""
    position = _behind_space(text, text.index("[") + 1)
    is_empty = text.startswith("]", position)
    for number in itertools.count(1):
        if is_empty:
            break
        location = f"{path}, entry {number}"
        with _json_errors(location):
            row, position = _DECODER.raw_decode(text, position)
        yield location, row
        position = _behind_space(text, position)
        if text.startswith("]", position):
            break
        if not text.startswith(",", position):
            raise json.JSONDecodeError("expected , or ]", text, position)
        position = _behind_space(text, position + 1)
    end = _behind_space(text, position + 1)
    if end < len(text):
        raise json.JSONDecodeError("there is more behind the array", text, end)


def _behind_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def parse_json(text: str, location: str) -> Any:
    """The value that a text spells. Raises ValueError with the location."""
    try:
        with _json_errors(location):
            return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location}: broken JSON at column {error.colno}: {error.msg}") from None


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=Decimal)
_SPACE = re.compile(r"[ \t\n\r]*")


@contextmanager
def _json_errors(location: str) -> Iterator[None]:
    try:
        yield
    except RepeatedKeyError as error:
        raise ValueError(f"{location}: {error}") from None
    except RecursionError:
        raise ValueError(f"{location}: nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{location}: {error}; write it as text") from None


# ---------------------------------------------------------------- tables


def _read_csv(
    path: Path, needed: Mapping[str, str], optional: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Rows of text; an empty cell is None. The first line names the columns.

    A word for a missing value is refused in the columns that are needed or optional.
    """
    csv.field_size_limit(2**31 - 1)  # of the process; a prompt may be longer than 131,072 bytes
    is_tsv = ".tsv" in (suffix.lower() for suffix in path.suffixes)
    with _open(path) as file:
        lines = (_decode(line, f"{path}:{n}") for n, line in enumerate(file, start=1))
        reader = csv.reader(lines, delimiter="\t" if is_tsv else ",", strict=True)
        header: list[str] | None = None
        while True:
            location = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{location}: broken CSV: {error}") from None
            if cells is None:
                return
            if header is None:
                header = cells
                skeleton = dict.fromkeys(header, True)
                columns = _choose_columns(path, needed, optional, skeleton, header)
            elif cells:  # an empty line is no row
                if len(cells) != len(header):
                    raise ValueError(
                        f"{location}: {len(cells)} cells, but the first line names {len(header)} "
                        "columns; put quotes around a cell with a delimiter or a line break"
                    )
                row = dict(zip(header, (cell or None for cell in cells), strict=True))
                _refuse_missing_words(row, columns, location)
                yield location, row


# pandas, and so `load_dataset`, reads them as null, in quotes, too.
_MISSING_WORDS = {
    *("nan", "-nan", "NaN", "-NaN", "NA", "<NA>", "N/A", "n/a", "#NA", "#N/A", "#N/A N/A"),
    *("null", "NULL", "None", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"),
}


def _refuse_missing_words(
    row: Mapping[str, str | None], columns: Sequence[str], location: str
) -> None:
    for column in columns:
        if (row[column] or "").strip() in _MISSING_WORDS:
            raise ValueError(
                f"{location}: column {column!r} holds {row[column]!r}, which is how tables write a "
                "missing value; fill it in, leave the row out, or write the rows as JSON Lines if "
                "the word is meant"
            )


def _read_parquet(
    path: Path, needed: Mapping[str, str], optional: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(64))
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            columns = _choose_columns(
                path, needed, (*optional, *ROW_OPTIONS), _skeleton(schema), schema.names
            )
            batches = table.iter_batches(columns=columns)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from _meant_rows(path, rows, schema)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error


def _read_hf_dataset(
    path: Path, needed: Mapping[str, str], optional: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install datasets`") from None

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # the library's errors for a damaged folder are of many kinds
        raise ValueError(f"{path}: cannot be read as a dataset folder: {error}") from error
    schema = dataset.features.arrow_schema
    columns = _choose_columns(
        path, needed, (*optional, *ROW_OPTIONS), _skeleton(schema), schema.names
    )
    dataset = dataset.with_format(None).select_columns(columns)  # it may be saved as arrays
    yield from _meant_rows(path, dataset, schema)


def _meant_rows(
    path: Path, rows: Iterable[dict[str, Any]], schema: pyarrow.Schema
) -> Iterator[tuple[str, Any]]:
    """Rows with their location, names in place of class labels, and numbers as they are meant."""
    features = declared_features(schema.metadata)
    shorten = shorten_columns(schema)
    for number, row in enumerate(rows, start=1):
        location = f"{path}, row {number}"
        if shorten is not None:
            row = shorten(row)
        if features:
            try:
                row = with_names(row, features)
            except ValueError as error:
                raise ValueError(f"{location}: {error}") from None
        yield location, row


def _skeleton(fields: Iterable[pyarrow.Field]) -> dict[str, Any]:
    """The columns of a table as a row of it has them: an object where there are columns inside."""
    return {
        field.name: _skeleton(field.type) if pyarrow.types.is_struct(field.type) else True
        for field in fields
    }


def _choose_columns(
    path: Path,
    needed: Mapping[str, str],
    optional: Sequence[str],
    skeleton: Mapping[str, Any],
    names: Sequence[str],
) -> list[str]:
    for column, fix in needed.items():
        if find_value(skeleton, column) is None:
            raise ValueError(f"{path}: {missing_column(column, skeleton)}; {fix}")
    columns = outer_columns((*needed, *optional), names)
    for column in columns:
        if names.count(column) > 1:
            raise ValueError(f"{path}: two columns are called {column!r}; rename one")
    return columns
