"""Rows of a prompt source: JSON Lines, a JSON array, parquet, or a Hugging Face dataset folder.

Whatever is wrong with a source is said with its file and line or row.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any


def read_rows(
    path: Path, format: str, needed: Mapping[str, str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (location for error messages, row) in the source's order.

    Args:
        needed: columns that a source with a table of columns must have, and what to do where it
            has them not.
        optional: columns to read as well, where they are.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    readers = {"jsonl": _read_json, "parquet": _read_parquet, "hf": _read_hf_dataset}
    return readers[_detect_format(path) if format == "auto" else format](path, needed, optional)


def _detect_format(path: Path) -> str:
    if path.is_dir():
        is_saved_dataset = any((path / n).exists() for n in ("state.json", "dataset_dict.json"))
        return "hf" if is_saved_dataset else "parquet"
    formats = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
    if path.suffix not in formats:
        raise ValueError(f"{path}: cannot tell its format by its name; set format")
    return formats[path.suffix]


def _read_json(
    path: Path, needed: Mapping[str, str], optional: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; a JSON Lines source is a file")
    with path.open("rb") as file:
        if file.read(1024).lstrip().startswith(b"["):
            file.seek(0)
            yield from _read_json_array(path, file.read())
            return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            location = f"{path}:{number}"
            if line.strip():
                yield location, _parse_json(_decode(line, location), location)


def _read_json_array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content, parse_float=Decimal)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path}: {error}; write it as text") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, entry {number}", row


def _decode(line: bytes, location: str) -> str:
    try:
        return line.decode("utf-8-sig")  # a byte-order mark is no part of the first line
    except UnicodeDecodeError:
        raise ValueError(f"{location}: not valid UTF-8") from None


def _parse_json(text: str, location: str) -> Any:
    try:
        return json.loads(text, parse_float=Decimal)
    except json.JSONDecodeError as error:
        raise ValueError(f"{location}: broken JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{location}: {error}; write it as text") from None


def _read_parquet(
    path: Path, needed: Mapping[str, str], optional: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: the folder holds no parquet files")
    for file in files:
        try:
            with ParquetFile(file) as table:
                columns = _choose_columns(file, needed, optional, table.schema_arrow.names)
                batches = table.iter_batches(columns=columns)
                rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
                for number, row in enumerate(rows, start=1):
                    yield f"{file}, row {number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: cannot be read as parquet: {error}") from error


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
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{path}: holds several splits; name one, such as {path / min(dataset)}")
    columns = _choose_columns(path, needed, optional, dataset.column_names)
    for number, row in enumerate(dataset.select_columns(columns), start=1):
        yield f"{path}, row {number}", row


def _choose_columns(
    path: Path, needed: Mapping[str, str], optional: Sequence[str], present: list[str]
) -> list[str]:
    for column, fix in needed.items():
        if column not in present:
            raise ValueError(f"{path}: {missing_column(column, present)}; {fix}")
    return list({column: None for column in (*needed, *optional) if column in present})


def missing_column(column: str, columns: list[str]) -> str:
    """The complaint about a row that lacks a value in a column."""
    return f"no value in the column {column!r}; the columns are {', '.join(map(repr, columns))}"
