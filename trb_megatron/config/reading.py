"""A configuration from a YAML file and `section.key=value` overrides, checked before anything else.

`load_config` names every unknown key, wrong value and impossible combination; `save_config` writes
the resolved configuration into the run folder.
"""

import argparse
import difflib
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trb_megatron.atomic_folder import write_file
from trb_megatron.config.conflicts import find_conflicts
from trb_megatron.config.options import Config, JobConfig
from trb_megatron.config.plain_yaml import BrokenYAML, dump_yaml, parse_value, parse_yaml
from trb_megatron.config.values import ConfigError


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides in order, and check the result.

    Override values have YAML syntax. Raises ConfigError naming the file and the line of broken
    YAML, or every unknown key, wrong value and impossible combination.
    """
    return parse_config(*_read_values(path, overrides or []))


def load_job_config(path: str | Path | None, overrides: list[str]) -> JobConfig:
    """Read the configuration of a job that does not train, as `load_config` does; None: no file.

    What training alone needs may be missing.
    """
    return _parse(JobConfig, *_read_values(path, overrides))


def is_override(word: str) -> bool:
    """Whether an argument of a command is an override; else it may name a file."""
    return re.match(r"[^/=]+=", word) is not None


def command_line(description: str | None, *, needs_config: bool = True) -> argparse.ArgumentParser:
    """A command's arguments: `config` and `overrides`, as `load_config` takes them.

    Options may stand anywhere between them: parse with `parse_intermixed_args`. A command that
    needs no configuration file may find the first override in `config`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config",
        metavar="CONFIG.yaml",
        nargs=None if needs_config else "?",
        help="the configuration" if needs_config else "a configuration, such as that of a run",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="options of the configuration to replace, in YAML syntax",
    )
    return parser


def parse_config(values: dict[str, Any], source: str = "configuration") -> Config:
    """Check nested plain values and build the configuration; `source` names them in errors.

    Raises ConfigError with one line for each unknown key, wrong value or impossible combination.
    """
    return _parse(Config, values, source)


_AnyConfig = TypeVar("_AnyConfig", bound=JobConfig)


def _parse(kind: type[_AnyConfig], values: dict[str, Any], source: str) -> _AnyConfig:
    # A section whose keys are all commented out reads as null: it has its defaults.
    present = {name: section for name, section in values.items() if section is not None}
    try:
        config = kind.model_validate(present)
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_describe(detail) for detail in details[:_MAX_LINES]]
        if len(details) > _MAX_LINES:
            lines.append(f"and {len(details) - _MAX_LINES} more")
        raise ConfigError("\n  ".join([f"{source}:", *lines])) from None
    if conflicts := list(find_conflicts(config)):
        raise ConfigError("\n  ".join([f"{source}:", *conflicts]))
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back equal.

    The file is complete or absent: it is written beside its place and renamed.
    """
    write_file(Path(path), dump_yaml(config.model_dump(mode="json")))


def _read_values(path: str | Path | None, overrides: list[str]) -> tuple[dict[str, Any], str]:
    """The values of a file and overrides, unchecked, and what to call them in errors."""
    values = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(values, override)
    if path is None:
        return values, "options and overrides"
    return values, f"{path} and overrides" if overrides else str(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        values = parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not valid UTF-8; save the file as UTF-8") from None
    except BrokenYAML as error:
        raise ConfigError(f"{path}:{error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as `run:` at the top level")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys, shown = name.strip().split("."), _shorten.repr(override)
    if not equals or not all(keys):
        raise ConfigError(f"override {shown}: write it as section.key=value")
    try:
        value = parse_value(text)
    except BrokenYAML as error:
        raise ConfigError(f"override {shown}: the value's line {error}") from None
    section = values
    for depth, key in enumerate(keys[:-1]):
        inner = {} if section.get(key) is None else section[key]
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {shown}: {'.'.join(keys[: depth + 1])} is a value, not a section"
            )
        section[key] = dict(inner)  # an alias may stand for the same mapping elsewhere
        section = section[key]
    section[keys[-1]] = value


_MAX_LINES = 20

# What an error shows of a value is short, even if it names itself or its parts a million times.
_shorten = reprlib.Repr()
_shorten.maxlevel = 2
_shorten.maxstring = 80


def _describe(detail: Any) -> str:
    """Turn one pydantic error into a line with the key, what is wrong and what to do."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        if "." in detail["loc"][-1]:
            return f"{key}: unknown key; a dotted key is an override: a file has sections with keys"
        return f"{key}: unknown key; did you mean {_nearest_key(key[:100])}?"
    if detail["type"] == "missing":
        return f"{key}: required, but not given"
    if detail["type"] == "model_type":
        return f"{key}: expected a section with keys (now {_shorten.repr(detail['input'])})"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "string_type":
        message += "; put quotes around text"
    return f"{key}: {message[0].lower()}{message[1:]} (now {_shorten.repr(detail['input'])})"


def _nearest_key(unknown: str) -> str:
    def similarity(known: str) -> float:
        whole = difflib.SequenceMatcher(None, unknown, known).ratio()
        leaf = difflib.SequenceMatcher(None, unknown.split(".")[-1], known.split(".")[-1]).ratio()
        return whole + leaf + (leaf == 1)  # a right key in the wrong section

    return max(_key_names(Config), key=similarity)


def _key_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = prefix + name
        yield key
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                in_dict = get_origin(field.annotation) is dict
                yield from _key_names(candidate, f"{key}.NAME." if in_dict else f"{key}.")
