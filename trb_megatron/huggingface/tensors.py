"""A Hugging Face checkpoint folder: its configuration, and its tensors read and written in slices.

Everything beside the weights (configuration, tokenizer, chat template, generation config) is
carried along as files, byte for byte.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trb_megatron.atomic_folder import PARTIAL_SUFFIX
from trb_megatron.file_checks import GIT_LFS_HEAD, unique_keys

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

    A key that appears twice and numbers that JSON doesn't have (NaN, Infinity) are refused, too:
    other readers would make something else of them.

    Raises:
        CheckpointError: the file is missing, is not UTF-8 JSON, or is not an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as every reader understands it."""
    value = unique_keys(pairs)
    for key, entry in pairs:
        for number in entry if isinstance(entry, list) else [entry]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key} is {number}, which is no number")
    return value


def refuse_lfs_pointer(file: Path) -> None:
    """Refuse the few lines that Git LFS leaves in place of a file that it has not fetched.

    Raises:
        CheckpointError: says how to fetch the file.
    """
    with file.open("rb") as opened:
        if opened.read(len(GIT_LFS_HEAD)) == GIT_LFS_HEAD:
            raise CheckpointError(
                f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
            )


class _Stored(NamedTuple):
    """Where a tensor lies: in an opened file, under a name."""

    handle: Any
    name: str
    file: Path


class HFTensors:
    """The safetensors files of a checkpoint folder, memory-mapped and read where they are sliced.

    As in transformers, a single file goes before an index, and an index says which files there are:
    what they hold counts. Of a tensor that lies in several files, all must have the same values.

    Attributes:
        absent: the file of each tensor that an index promises and no file has.

    Raises:
        CheckpointError: no safetensors, an index that names a missing file or a file outside the
            folder, a tensor with two values, or a truncated or corrupt file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_partial(path)
        self._stored: dict[str, _Stored] = {}
        self._file_names: list[str] = []
        self.absent: dict[str, str] = {}
        if (path / SINGLE_FILE).is_file():
            self._add(SINGLE_FILE)
        elif (path / INDEX_FILE).is_file():
            weight_map = read_weight_map(path / INDEX_FILE)
            for name in sorted(set(weight_map.values())):
                self._add(name)
            self.absent = {t: name for t, name in weight_map.items() if t not in self._stored}
        else:
            raise CheckpointError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} found")

    def _add(self, name: str) -> None:
        handle = self._open(name)
        self._file_names.append(name)
        for tensor in handle.keys():
            other = self._stored.get(tensor)
            self._stored[tensor] = _Stored(handle, tensor, self.path / name)
            if other is not None and not _are_equal(
                self.slice(tensor), other.handle.get_slice(tensor)
            ):
                raise CheckpointError(
                    f"{self.path / name}: tensor {tensor} has other values in another file of "
                    f"{INDEX_FILE}; keep one of them"
                )

    def _open(self, name: str) -> Any:
        file = self.path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, but {INDEX_FILE} names it")
        refuse_lfs_pointer(file)
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: truncated or corrupt ({error})") from error

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return [self.path / name for name in self._file_names]

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name, which no other has."""
        assert new not in self._stored
        self._stored[new] = self._stored.pop(old)

    def slice(self, name: str) -> Any:
        """A lazy slice of a tensor: index it to read."""
        stored = self._stored[name]
        return stored.handle.get_slice(stored.name)

    def locate(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._stored[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        return tuple(self.slice(name).get_shape())

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and, in fp32, the same values."""
        return _are_equal(self.slice(one), self.slice(other))

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


def _are_equal(one: Any, other: Any) -> bool:
    """Whether slices are equal in fp32; reads some rows at a time, as a vocabulary is large."""
    if one.get_shape() != other.get_shape():
        return False
    if not one.get_shape():
        return torch.equal(one[...].float(), other[...].float())
    num_rows = 4096
    return all(
        torch.equal(one[row : row + num_rows].float(), other[row : row + num_rows].float())
        for row in range(0, one.get_shape()[0], num_rows)
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index has it.

    Raises:
        CheckpointError: a broken index, or one that names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map is {weight_map!r}; expected the file of each tensor; download "
            "the index once more"
        )
    for name in weight_map.values():
        check_file_name(name, index)
    return weight_map


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
