"""A Hugging Face checkpoint folder: its configuration, and its tensors read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, naming the file when it is missing or broken.

    Raises:
        CheckpointError: the file is missing, is not UTF-8 JSON, or is not an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class HFTensors:
    """The safetensors files of a checkpoint folder, memory-mapped and read where they are sliced.

    Raises:
        CheckpointError: no safetensors, an index that names a missing file or tensor, or a
            truncated or corrupt file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / INDEX_FILE).is_file():
            weight_map = read_json(path / INDEX_FILE).get("weight_map", {})
        elif (path / SINGLE_FILE).is_file():
            weight_map = None
        else:
            pickled = sorted(p.name for p in path.glob("*.bin")) if path.is_dir() else []
            hint = (
                f"; {pickled[0]} is a pickle, which is never loaded: save with safetensors"
                if pickled
                else ""
            )
            raise CheckpointError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} found{hint}")
        files = {SINGLE_FILE} if weight_map is None else set(weight_map.values())
        self._handles = {name: self._open(name) for name in sorted(files)}
        contents = {
            tensor: name for name, handle in self._handles.items() for tensor in handle.keys()
        }
        self._file_of = contents if weight_map is None else weight_map
        for tensor, name in self._file_of.items():
            if contents.get(tensor) != name:
                raise CheckpointError(
                    f"{path / INDEX_FILE}: tensor {tensor} is not in {name}, where the index has it"
                )

    def _open(self, name: str) -> Any:
        file = self.path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, but {INDEX_FILE} names it")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or corrupt ({error})") from error

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def slice(self, name: str) -> Any:
        """A lazy slice of a tensor: index it to read."""
        return self._handles[self._file_of[name]].get_slice(name)

    def dtype(self) -> str:
        """The floating type of the tensors, as torch spells it ("bfloat16").

        Raises:
            CheckpointError: a tensor is neither fp32, fp16 nor bf16 (a quantised checkpoint).
        """
        for name in sorted(self.names):
            dtype = self.slice(name).get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has type {dtype}; only fp32, fp16 and bf16 "
                    "weights can be loaded (dequantise the checkpoint first)"
                )
        return DTYPES[self.slice(min(self.names)).get_dtype()]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint that lacks a tensor or has one of another shape.

        Raises:
            CheckpointError: names all missing tensors, or the first of a wrong shape.
        """
        missing = sorted(set(expected) - self.names)
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise CheckpointError(f"{self.path}: {len(missing)} tensors are missing: {shown}")
        for name, shape in expected.items():
            found = tuple(self.slice(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has shape {list(found)}, "
                    f"config.json asks for {list(shape)}"
                )
