"""The files of a prompt source: which of a folder are read, by which format, and of which split.

Splits are found as `datasets.load_dataset` finds them, so that a folder means the same to both:
https://huggingface.co/docs/datasets/repository_structure
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
# They describe a dataset and hold no rows of it.
_DESCRIPTIONS = {
    *("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"),
}
_SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_SHARD = re.compile(r"data/(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


@dataclass(frozen=True)
class SourceFiles:
    """What is read of a source.

    Attributes:
        files: in the order in which they are read; the folder of a dataset that was saved to disk.
        format: a key of `SUFFIXES`, or "hf" for a dataset that was saved to disk.
        split: the split of a folder that is read; None where the source is a file or one dataset.
        splits: all that the folder has.
        unread: files of rows that belong to no split, as `load_dataset` passes over them.
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
    saved = {folder.parent.name: [folder.parent] for folder in sorted(path.glob("*/state.json"))}
    if format == "hf" or (format == "auto" and saved):
        if not saved:
            raise ValueError(f"{path}: cannot be read as a dataset folder: it has no state.json")
        found, splits, unread = "hf", saved, []
    else:
        files = _files_of_rows(path, format)
        splits = _declared_splits(path, files) or _splits_by_name(path, files)
        in_splits = {file for files_ in splits.values() for file in files_}
        found, unread = format, [file for file in files if file not in in_splits]
    chosen = _choose_split(path, splits, split, default_split, section)
    if found != "hf":
        found = _common_format(path, chosen, splits, section)
    return SourceFiles(tuple(splits[chosen]), found, chosen, tuple(splits), tuple(unread))


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


def _files_of_rows(path: Path, format: str) -> list[Path]:
    """The files of a folder, at any depth, that can hold rows; sorted by path."""

    def is_visible(file: Path) -> bool:
        *folders, name = file.relative_to(path).parts
        is_hidden = any(part.startswith((".", "__")) for part in folders) or name.startswith(".")
        return not is_hidden and name not in _DESCRIPTIONS

    formats = set(SUFFIXES) if format == "auto" else {format}
    files = [f for f in sorted(path.rglob("*")) if is_visible(f) and _split_name(f)[0] in formats]
    files = [file for file in files if file.is_file()]
    if not files:
        kind = "" if format == "auto" else f"{format} "
        raise ValueError(f"{path}: the folder holds no {kind}files; those read end in {_READABLE}")
    return files


def _splits_by_name(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The splits that names of shards, else of folders, else of files tell; else all is train."""
    names = {file: file.relative_to(path) for file in files}
    shards: dict[str, list[Path]] = {}
    for file, name in names.items():
        if shard := _SHARD.fullmatch(name.as_posix()):
            shards.setdefault(shard["split"], []).append(file)
    if shards:
        return shards
    for is_told_by in (lambda name: name.parts[:-1], lambda name: name.parts[-1:]):
        splits = {
            split: [f for f, name in names.items() if any(map(_has_word(words), is_told_by(name)))]
            for split, words in _SPLIT_WORDS.items()
        }
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {"train": list(files)}


def _has_word(words: str) -> Any:
    return re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)", re.IGNORECASE).search


def _declared_splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """The splits that the `configs` at the top of a dataset's README.md declare, if any."""
    readme = path / "README.md"
    top = None
    if readme.is_file():
        top = re.match(r"---\s*\n(.*?\n)---", readme.read_text("utf-8", "replace"), re.DOTALL)
    try:
        description = yaml.safe_load(top[1]) if top else None
    except yaml.YAMLError as error:
        raise ValueError(f"{readme}: broken YAML at its top: {error}") from None
    configs = description.get("configs") if isinstance(description, dict) else None
    if not configs:
        return None
    try:
        return _splits_of_configs(path, files, configs)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"{readme}: its `configs` do not say which files to read ({error}); name a file"
        ) from error


def _splits_of_configs(path: Path, files: Sequence[Path], configs: Any) -> dict[str, list[Path]]:
    by_name = {config["config_name"]: config for config in configs}
    defaults = [
        name
        for name, config in by_name.items()
        if len(by_name) == 1 or name == "default" or config.get("default")
    ]
    if len(defaults) != 1:
        raise ValueError(f"there are several: {', '.join(by_name)}")
    config = by_name[defaults[0]]
    base = path / config.get("data_dir", "")
    patterns = config.get("data_files")
    if patterns is None:
        return _splits_by_name(base, [file for file in files if file.is_relative_to(base)])
    if isinstance(patterns, str):
        patterns = [patterns]
    if isinstance(patterns, list) and not all(isinstance(entry, dict) for entry in patterns):
        patterns = [{"split": "train", "path": patterns}]
    if isinstance(patterns, dict):
        patterns = [{"split": split, "path": found} for split, found in patterns.items()]
    splits: dict[str, list[Path]] = {}
    for entry in patterns:
        of_split = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        matches = {match for pattern in of_split for match in base.glob(pattern)}
        if found := [file for file in files if file in matches]:
            splits[entry["split"]] = found
    if not splits:
        raise ValueError("the files that they name are not there")
    return splits


def _choose_split(
    path: Path,
    splits: Mapping[str, Sequence[Path]],
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
    for other, files in splits.items():
        both = set(files) & set(splits[chosen]) if other != chosen else set()
        if both:
            raise ValueError(
                f"{min(both)}: belongs to the splits {chosen} and {other} by its name; rename it, "
                f"or name a file in {section}.path"
            )
    return chosen


def _common_format(
    path: Path, split: str, splits: Mapping[str, Sequence[Path]], section: str
) -> str:
    """The format of all files of a split; they might hold the same rows in two formats."""
    by_suffix = {_split_name(file)[1]: file for file in splits[split]}
    if len(by_suffix) > 1:
        raise ValueError(
            f"{path}: the split {split} has files of several kinds ({', '.join(by_suffix)}), which "
            f"may hold the same rows; name a file in {section}.path, or set {section}.format"
        )
    (file,) = by_suffix.values()
    format, _ = _split_name(file)
    assert format is not None
    return format
