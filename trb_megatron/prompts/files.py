"""The files of a prompt source: which of a folder are read, by which format, and of which split.

Splits are found as `datasets.load_dataset` finds them, so that a folder means the same to both:
https://huggingface.co/docs/datasets/repository_structure
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

from trb_megatron.prompts.dataset_card import CARD_FILE, read_card
from trb_megatron.prompts.readers import parse_json

SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
COMPRESSIONS = (".gz", ".zst")
"""Behind the suffix of a text format. A parquet file is compressed inside."""

_READABLE = (
    f"{', '.join([*SUFFIXES['jsonl'], *SUFFIXES['csv']])} (also with {' or '.join(COMPRESSIONS)} "
    f"behind it) and {SUFFIXES['parquet'][0]}"
)
_SAVED_SPLITS = "dataset_dict.json"
# They describe a dataset and hold no rows of it.
_DESCRIPTIONS = {
    *(CARD_FILE, _SAVED_SPLITS, "config.json", "dataset_info.json", "dataset_infos.json"),
    "state.json",
}
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SHARD = re.compile(r"data/(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?!\d)[^/]*")


@dataclass(frozen=True)
class SourceFiles:
    """What is read of a source.

    Attributes:
        files: in the order in which they are read; the folder of a dataset that was saved to disk.
        format: a key of `SUFFIXES`, or "hf" for a dataset that was saved to disk.
        split: the split of a folder that is read; None where the source is a file or one dataset.
        splits: all that the folder has.
        unread: files of no split, or without rows, as `load_dataset` passes over them.
    """

    files: tuple[Path, ...]
    format: str
    split: str | None = None
    splits: tuple[str, ...] = ()
    unread: tuple[Path, ...] = ()


def find_files(
    path: Path,
    format: str,
    section: str,
    split: str | None = None,
    default_split: str | None = None,
) -> SourceFiles:
    """Find what to read at a path.

    Args:
        format: "auto", or the only one to read.
        section: of the configuration, for errors.
        split: of a folder; None: `default_split` where there are several.

    Raises:
        ValueError: there is nothing to read, or no telling what; names the path and the option that
            tells.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    is_dataset = (path / "state.json").exists()
    if path.is_file() or is_dataset:
        if split is not None:
            what = "one dataset" if is_dataset else "a file"
            raise ValueError(f"{path}: is {what}, without splits; leave out {section}.split")
        if format == "auto":
            format = "hf" if is_dataset else _format_of_file(path, section)
        return SourceFiles((path,), format)
    unread: list[Path] = []
    splits = _saved_splits(path) if format in ("auto", "hf") else {}
    if is_saved := format == "hf" or bool(splits):
        if not splits:
            raise ValueError(f"{path}: cannot be read as a dataset folder: it has no state.json")
    else:
        visible = _visible_files(path)
        splits = _splits_of_files(path, visible, format)
        in_splits = {file for split_ in splits.values() for file in split_.files}
        unread = [file for file in visible if file not in in_splits]
    chosen = _choose_split(path, splits, split, default_split, section)
    _refuse_missing(path, chosen, splits[chosen], section)
    found = "hf" if is_saved else _common_format(path, chosen, splits[chosen].files, section)
    return SourceFiles(tuple(splits[chosen].files), found, chosen, tuple(splits), tuple(unread))


class _Split(NamedTuple):
    """The files of a split.

    Attributes:
        files: in the order in which they are read.
        listed: those that a description of the dataset names one by one.
        missing: which description names what, of which there is no file; None: all is there.
    """

    files: Sequence[Path]
    listed: frozenset[Path] = frozenset()
    missing: str | None = None


def _saved_splits(path: Path) -> dict[str, _Split]:
    """The splits of a dataset that was saved to disk; of none, where it is something else."""
    description = path / _SAVED_SPLITS
    if not description.is_file():
        return {f.parent.name: _Split([f.parent]) for f in sorted(path.glob("*/state.json"))}
    values = parse_json(description.read_text("utf-8"), str(description))
    names = values.get("splits") if isinstance(values, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{description}: has no list of splits; save the dataset again")
    return {
        name: _Split([path / name])
        if (path / name / "state.json").is_file()
        else _Split([], missing=f"{_SAVED_SPLITS} names the split {name}")
        for name in names
    }


def _split_name(file: Path) -> tuple[str | None, str]:
    """A file's format by its name, None where it has none that is read, and the whole suffix."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    last = suffixes[-1] if suffixes else ""
    for format, names in SUFFIXES.items():
        if last in names and not (compression and format == "parquet"):
            return format, last + compression
    return None, last + compression


def _format_of_file(path: Path, section: str) -> str:
    format, _ = _split_name(path)
    if format is None:
        raise ValueError(
            f"{path}: cannot tell its format by its name; files that can be read end in "
            f"{_READABLE}: convert or rename it, or set {section}.format"
        )
    return format


def _holds_rows(file: Path, format: str) -> bool:
    """Whether `load_dataset` takes a file for rows of a format: by any part of its name's end."""
    found, _ = _split_name(file)
    if found is not None:
        return format in ("auto", found)
    names = {name for key in SUFFIXES if format in ("auto", key) for name in SUFFIXES[key]}
    return any(suffix.lower() in names for suffix in file.suffixes)


def _visible_files(path: Path) -> list[Path]:
    """The files of a folder, at any depth, that do not describe it; sorted by path."""

    def is_visible(file: Path) -> bool:
        *folders, name = file.relative_to(path).parts
        is_hidden = any(part.startswith((".", "__")) for part in folders) or name.startswith(".")
        return not is_hidden and name not in _DESCRIPTIONS

    return [file for file in sorted(path.rglob("*")) if is_visible(file) and file.is_file()]


def _splits_of_files(path: Path, visible: Sequence[Path], format: str) -> dict[str, _Split]:
    """The splits of a folder that its README.md declares; else those that names tell."""
    rows = [file for file in visible if _holds_rows(file, format)]
    if not rows:
        kind = "" if format == "auto" else f"{format} "
        raise ValueError(f"{path}: the folder holds no {kind}files; those read end in {_READABLE}")
    declared = read_card(path)
    if declared is None:
        return _splits_by_name(path, rows)
    base = path / declared.data_dir
    if declared.patterns is None:
        if inside := [file for file in rows if file.is_relative_to(base)]:
            return _splits_by_name(base, inside)
        return {"train": _Split([], missing=f"{CARD_FILE} names the folder {declared.data_dir}")}
    return {
        split: _matching_files(base, patterns, visible, format)
        for split, patterns in declared.patterns.items()
    }


def _matching_files(
    base: Path, patterns: Iterable[str], visible: Sequence[Path], format: str
) -> _Split:
    """The files of patterns, in their order; of a pattern that matches rows, the rows alone."""
    files: dict[Path, None] = {}
    listed: set[Path] = set()
    for pattern in patterns:
        matches = set(base.glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
        found = [file for file in visible if file in matches]
        if not found:
            return _Split([], missing=f"{CARD_FILE} names {pattern}")
        rows = [file for file in found if _holds_rows(file, format)]
        rows = rows or [file for file in found if _split_name(file)[0] is None]
        files |= dict.fromkeys(rows)
        listed |= set() if has_magic(pattern) else set(rows)
    return _Split(list(files), frozenset(listed))


def _splits_by_name(path: Path, files: Sequence[Path]) -> dict[str, _Split]:
    """The splits that names of shards, else of folders, else of files tell; else all is train."""
    names = {file: file.relative_to(path) for file in files}
    shards: dict[str, list[Path]] = {}
    for file, name in names.items():
        if shard := _SHARD.fullmatch(name.as_posix()):
            shards.setdefault(shard["split"], []).append(file)
    if shards:
        return {split: _Split(found) for split, found in shards.items()}
    for is_told_by in (lambda name: name.parts[:-1], lambda name: name.parts[-1:]):
        splits = {
            split: [f for f, name in names.items() if any(map(_has_word(words), is_told_by(name)))]
            for split, words in _SPLIT_WORDS.items()
        }
        if any(splits.values()):
            return {split: _Split(found) for split, found in splits.items() if found}
    return {"train": _Split(files)}


def _has_word(words: str) -> Any:
    return re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", re.IGNORECASE).search


def _choose_split(
    path: Path,
    splits: Mapping[str, _Split],
    wanted: str | None,
    default: str | None,
    section: str,
) -> str:
    names = ", ".join(splits)
    only = next(iter(splits)) if len(splits) == 1 else None
    chosen = wanted or only or default
    if chosen is None or chosen not in splits:
        has_it = f"has no split {wanted}, but" if wanted else "has the splits"
        raise ValueError(
            f"{path}: {has_it} {names}; choose a split by {section}.split, or name one of its "
            f"files in {section}.path"
        )
    for other, (files, *_) in splits.items():
        both = set(files) & set(splits[chosen].files) if other != chosen else set()
        if both:
            raise ValueError(
                f"{min(both)}: belongs to the splits {chosen} and {other} by its name; rename it, "
                f"or name a file in {section}.path"
            )
    return chosen


def _refuse_missing(path: Path, name: str, split: _Split, section: str) -> None:
    """Refuse a split of which files are missing that a description or their numbers tell of."""
    fix = f"fetch what is missing, or name a file in {section}.path"
    if split.missing is not None:
        raise ValueError(f"{path}: {split.missing}, but it is not there; {fix}")
    if not split.files:
        raise ValueError(f"{path}: the split {name} has no files of this {section}.format; {fix}")
    shards: dict[tuple[str, str], set[int]] = {}
    for file in split.files:
        match = _NUMBERED.fullmatch(file.relative_to(path).as_posix())
        if match is not None and file not in split.listed:
            shards.setdefault((match["stem"], match["total"]), set()).add(int(match["number"]))
    for (stem, total), numbers in shards.items():
        last = int(total)
        whole = range(1, last + 1) if last in numbers else range(last)
        if absent := sorted(set(whole) - numbers):
            raise ValueError(
                f"{path}: has {last - len(absent)} of {last} files {stem}-*-of-{total}; "
                f"{stem}-{absent[0]:05d}-of-{total} is not there; {fix}"
            )


def _common_format(path: Path, split: str, files: Sequence[Path], section: str) -> str:
    """The format of all files of a split; they might hold the same rows in two formats."""
    for file in files:
        if _split_name(file)[0] is None:
            raise ValueError(
                f"{file}: belongs to the split {split}, but its kind cannot be read; files that "
                f"can be read end in {_READABLE}: convert or remove it, or name a file in "
                f"{section}.path"
            )
    by_suffix = {_split_name(file)[1]: file for file in files}
    if len(by_suffix) > 1:
        raise ValueError(
            f"{path}: the split {split} has files of several kinds ({', '.join(by_suffix)}), which "
            f"may hold the same rows; name a file in {section}.path, or set {section}.format"
        )
    (file,) = by_suffix.values()
    format, _ = _split_name(file)
    assert format is not None
    return format
