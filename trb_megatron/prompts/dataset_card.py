"""Which files a dataset's README.md declares: `configs` in the YAML at its top.

https://huggingface.co/docs/hub/datasets-manual-configuration
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

CARD_FILE = "README.md"

_YAML_BLOCK = re.compile(r"\s*---\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class DeclaredFiles:
    """Where the default configuration of a dataset finds its files.

    Attributes:
        data_dir: the folder that paths and patterns begin at, in that of the dataset.
        patterns: by split, in the order of its files; None: names of files and folders tell.
    """

    data_dir: str
    patterns: dict[str, list[str]] | None


def read_card(folder: Path) -> DeclaredFiles | None:
    """What a folder's README.md declares; None: nothing.

    Raises:
        ValueError: it is broken, or does not say which files to read.
    """
    card = folder / CARD_FILE
    top = None
    if card.is_file():
        top = _YAML_BLOCK.match(card.read_text("utf-8-sig", "replace"))
    try:
        description = yaml.safe_load(top[1]) if top else None
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: broken YAML at its top: {error}") from None
    configs = description.get("configs") if isinstance(description, dict) else None
    if not configs:
        return None
    try:
        return _default_files(_CONFIGS.validate_python(configs))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(map(str, ("configs", *wrong["loc"])))
        reason = f"{place}: {wrong['msg']}"
    except ValueError as error:
        reason = str(error)
    raise ValueError(
        f"{card}: its `configs` do not say which files to read ({reason}); name a file"
    )


class _DataFiles(BaseModel):
    """The files of a split, as patterns."""

    split: str
    path: str | list[str]


class _DataConfig(BaseModel):
    """An entry of `configs`, as far as it decides which files are read."""

    config_name: str
    default: bool = False
    data_dir: str = ""
    data_files: str | list[str] | list[_DataFiles] | dict[str, str | list[str]] | None = None


_CONFIGS = TypeAdapter(list[_DataConfig])


def _default_files(configs: list[_DataConfig]) -> DeclaredFiles:
    by_name = {config.config_name: config for config in configs}
    defaults = [
        name
        for name, config in by_name.items()
        if len(by_name) == 1 or name == "default" or config.default
    ]
    if len(defaults) != 1:
        raise ValueError(f"there are several: {', '.join(by_name)}")
    config = by_name[defaults[0]]
    if config.data_files is None:
        return DeclaredFiles(config.data_dir, None)
    entries = list(_patterns_by_split(config.data_files))
    counts = Counter(split for split, _ in entries)
    if twice := [split for split, count in counts.items() if count > 1]:
        raise ValueError(f"the split {twice[0]} stands twice")
    for pattern in [pattern for _, patterns in entries for pattern in patterns]:
        if not pattern or Path(pattern).is_absolute():
            raise ValueError(f"{pattern!r} is not in the folder")
    return DeclaredFiles(config.data_dir, dict(entries))


def _patterns_by_split(
    data_files: str | list[str] | list[_DataFiles] | dict[str, str | list[str]],
) -> Iterator[tuple[str, list[str]]]:
    """Every spelling of `data_files` as splits and their patterns."""
    if isinstance(data_files, str):
        data_files = [data_files]
    entries = data_files.items() if isinstance(data_files, dict) else _entries(data_files)
    for split, patterns in entries:
        yield split, [patterns] if isinstance(patterns, str) else patterns


def _entries(
    data_files: list[str] | list[_DataFiles],
) -> Iterator[tuple[str, str | list[str]]]:
    names = [entry for entry in data_files if isinstance(entry, str)]
    if names:
        yield "train", names
    yield from ((entry.split, entry.path) for entry in data_files if isinstance(entry, _DataFiles))
