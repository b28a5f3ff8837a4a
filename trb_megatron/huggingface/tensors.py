"""A Hugging Face checkpoint folder: its configuration, and its tensors read and written in slices.

Everything beside the weights (configuration, tokenizer, chat template, generation config) is
carried along as files, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trb_megatron.atomic_folder import PARTIAL_SUFFIX

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"),
    *("*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz", "*.ckpt"),
)
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the tensor."""


def check_file_name(name: object, named_by: Path) -> None:
    """Refuse a name in a file that is not plainly that of a file beside it.

    Raises:
        CheckpointError: it would lead out of the folder, or is no text.
    """
    if not isinstance(name, str) or name != Path(name).name:
        raise CheckpointError(
            f"{named_by}: refused, it names the file {name!r}, which is not in its folder"
        )


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
        CheckpointError: no safetensors, an index that names a missing file or tensor or a file
            outside the folder, or a truncated or corrupt file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_partial(path)
        if (path / INDEX_FILE).is_file():
            weight_map = read_json(path / INDEX_FILE).get("weight_map", {})
        elif (path / SINGLE_FILE).is_file():
            weight_map = None
        else:
            raise CheckpointError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} found")
        for name in (weight_map or {}).values():
            check_file_name(name, path / INDEX_FILE)
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
    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return [self.path / name for name in self._handles]

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def slice(self, name: str) -> Any:
        """A lazy slice of a tensor: index it to read."""
        return self._handles[self._file_of[name]].get_slice(name)

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The floating type of each of these tensors.

        Raises:
            CheckpointError: a tensor is neither fp32, fp16 nor bf16 (a quantised checkpoint).
        """
        found = {name: self.slice(name).get_dtype() for name in names}
        for name, dtype in found.items():
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has type {dtype}; only fp32, fp16 and bf16 "
                    "weights can be loaded (dequantise the checkpoint first)"
                )
        return {name: DTYPES[dtype] for name, dtype in found.items()}

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


def refuse_partial(path: Path) -> None:
    """Refuse a folder that was being written when its writer died.

    Raises:
        CheckpointError: the folder's name says that it is not complete.
    """
    if path.name.endswith(PARTIAL_SUFFIX):
        raise CheckpointError(f"{path}: incomplete; whatever wrote it did not finish. Run it again")


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything but the weights of an HF checkpoint folder."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(file, target / file.name)
    if (source / CHAT_TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / CHAT_TEMPLATE_FOLDER, target / CHAT_TEMPLATE_FOLDER)


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and shape of a tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: Iterable[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Cut tensors into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    shards: list[list[TensorInfo]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def shard_name(index: int, num_shards: int) -> str:
    """The file name that transformers gives a shard."""
    if num_shards == 1:
        return SINGLE_FILE
    return f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def write_index(folder: Path, shards: list[list[TensorInfo]]) -> None:
    """Write the index that a checkpoint of several files needs, as transformers does."""
    if len(shards) == 1:
        return
    weight_map = {
        tensor.name: shard_name(i, len(shards))
        for i, shard in enumerate(shards)
        for tensor in shard
    }
    total_size = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """One safetensors file, written tensor by tensor in the order announced.

    A file begins with the length of its header (8 bytes, little endian) and the header, a JSON
    object with the type, shape and byte range of each tensor; the tensors' bytes follow.
    """

    def __init__(self, file: BinaryIO, tensors: Iterable[TensorInfo]) -> None:
        self._file = file
        self._expected = iter(list(tensors))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
            offset += tensor.num_bytes
        encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
        encoded += b" " * (-len(encoded) % 8)  # the tensors start at a multiple of 8
        file.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, in the announced type."""
        expected = next(self._expected)
        assert (name, tuple(tensor.shape)) == (expected.name, expected.shape)
        flat = tensor.to(device="cpu", dtype=expected.dtype).contiguous().flatten()
        self._file.write(flat.view(torch.uint8).numpy().data)
