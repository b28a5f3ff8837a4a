"""The tensors of a Megatron checkpoint, read block by block without a model.

A Megatron checkpoint (`megatron.core.dist_checkpointing`, format torch_dist) is a folder in the
format of `torch.distributed.checkpoint`: tensors cut into chunks, one for each tensor-parallel rank
that wrote it, and an index of all chunks. It knows no layout: any layout can read it.
`dist_checkpointing` loads whole state dicts; here reading maps the files, so that it needs no
memory for a model (`tensor_writer` writes in the same way).

Besides the tensors, the folder carries what an export needs: the HF configuration, tokenizer, chat
template and generation config in `hf/`, the types of the HF tensors in `hf_dtypes.json`, and the
sums of all files.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorStorageMetadata,
)

from trb_megatron.checkpoint.checksums import check_sums
from trb_megatron.checkpoint.safe_loading import INDEX_FILE, read_index
from trb_megatron.huggingface.config import HFModelConfig, read_hf_config
from trb_megatron.huggingface.kinds import Shape
from trb_megatron.huggingface.model_tensors import expected_tensors, open_model
from trb_megatron.huggingface.param_mapping import MappedParam, stored_params
from trb_megatron.huggingface.tensors import (
    DTYPES,
    CheckpointError,
    copy_side_files,
    read_json,
    refuse_partial,
)

HF_FOLDER = "hf"
DTYPES_FILE = "hf_dtypes.json"
_READ_BYTES = 32 * 2**20  # at most this much of a chunk is copied at a time


def carry_hf_files(config: HFModelConfig, checkpoint: Path) -> None:
    """Put what an export needs besides weights into a Megatron checkpoint.

    Args:
        config: of the HF checkpoint folder that the model comes from.

    Raises:
        CheckpointError: the model cannot be read from that folder.
    """
    copy_side_files(config.path, checkpoint / HF_FOLDER)
    tensors, _ = open_model(config)
    found = tensors.dtypes(expected_tensors(config))
    dtypes = {name: str(dtype)[6:] for name, dtype in found.items()}
    default = Counter(dtypes.values()).most_common(1)[0][0]
    others = {name: dtype for name, dtype in dtypes.items() if dtype != default}
    record = {"default": default, "others": others}
    (checkpoint / DTYPES_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_hf_dtypes(checkpoint: Path) -> Callable[[str], torch.dtype]:
    """The type of each HF tensor, by name, in the checkpoint that this one was made from.

    Raises:
        CheckpointError: the record names a type that weights cannot have.
    """
    record = read_json(checkpoint / DTYPES_FILE)
    dtypes = {str(dtype)[6:]: dtype for dtype in DTYPES.values()}
    unknown = {record["default"], *record["others"].values()} - set(dtypes)
    if unknown:
        raise CheckpointError(f"{checkpoint / DTYPES_FILE}: no types of weights: {sorted(unknown)}")
    return lambda name: dtypes[record["others"].get(name, record["default"])]


@dataclass(frozen=True)
class _StoredChunk:
    """Where a chunk lies in its tensor (without the stack axes), and its bytes on the disk."""

    bounds: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    file: Path
    offset: int
    length: int

    def read_into(self, target: Tensor, wanted: tuple[tuple[int, int], ...]) -> None:
        """Copy the part of this chunk that lies in `wanted` to its place in `target`."""
        shared = [
            (max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.bounds, wanted, strict=True)
        ]
        if any(start >= stop for start, stop in shared):
            return
        here = [slice(a - c, b - c) for (a, b), (c, _) in zip(shared, self.bounds, strict=True)]
        there = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(shared, wanted, strict=True))
        destination = target[there]
        row_shape = [stop - start for start, stop in self.bounds[1:]]
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        rows_at_once = max(1, _READ_BYTES // row_bytes)
        stored = self._map()
        for row in range(here[0].start, here[0].stop, rows_at_once):
            num_rows = min(rows_at_once, here[0].stop - row)
            # The copy is aligned as its type asks; the mapped bytes may start anywhere.
            data = stored[row * row_bytes : (row + num_rows) * row_bytes].clone().view(self.dtype)
            first = row - here[0].start
            destination[first : first + num_rows] = data.view(num_rows, *row_shape)[
                (slice(None), *here[1:])
            ]

    def _map(self) -> Tensor:
        """The bytes of the chunk, mapped into memory.

        A chunk is what `torch.save` makes of a tensor: an uncompressed zip archive whose entry
        data/0 is the contiguous tensor (torch's notes on serialization).
        """
        num_bytes = math.prod(b - a for a, b in self.bounds) * self.dtype.itemsize
        padding = self.offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.file.open("rb") as file:
                mapped: Any = mmap.mmap(
                    file.fileno(),
                    self.length + padding,
                    offset=self.offset - padding,
                    access=mmap.ACCESS_COPY,  # torch asks for memory that it could write to
                )
            # What lies before an archive is skipped.
            with zipfile.ZipFile(mapped) as archive:
                entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != num_bytes:
                raise zipfile.BadZipFile(f"a chunk holds {entry.file_size} of {num_bytes} bytes")
        except (OSError, ValueError, StopIteration, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.file}: truncated or corrupt ({error})") from error
        header = entry.header_offset
        name_length, extra_length = struct.unpack("<HH", mapped[header + 26 : header + 30])
        start = header + 30 + name_length + extra_length
        return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=start)


@dataclass(frozen=True)
class _FullParam:
    """A parameter at tensor-parallel size 1, read from its chunks where it is indexed."""

    shape: Shape
    dtype: torch.dtype
    chunks: list[_StoredChunk]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (len(self.shape) - len(index))
        wanted = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        target = torch.empty([stop - start for start, stop in wanted], dtype=self.dtype)
        for chunk in self.chunks:
            chunk.read_into(target, wanted)
        return target


@dataclass(frozen=True)
class _HFSlice:
    """An HF tensor inside a parameter of a Megatron checkpoint."""

    param: MappedParam
    name: str
    full: _FullParam

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return self.param.read_hf(self.full, self.name)[index]


class MegatronTensors:
    """The model of a Megatron checkpoint as the HF tensors that it is made of.

    Whatever layout wrote it, a training run or `write_checkpoint`; other tensors in it, those of an
    optimizer, are not looked at.

    Args:
        check: read all files against their sums first; collective over all ranks of a job.

    Raises:
        CheckpointError: not a Megatron checkpoint, an incomplete or a damaged one.
    """

    def __init__(self, path: Path, *, check: bool = True) -> None:
        self.path = path
        refuse_partial(path)
        if not (path / INDEX_FILE).is_file():
            raise CheckpointError(f"{path}: not a complete Megatron checkpoint (no {INDEX_FILE})")
        if check:
            check_sums(path)
        self._metadata = read_index(path)
        self._params: dict[str, MappedParam] = {}
        self._chunks: dict[tuple[str, Shape], list[_StoredChunk]] = {}

    @property
    def padded_vocab_size(self) -> int:
        return int(self._entry("embedding.word_embeddings.weight").size[0])

    def shapes(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of every tensor in the checkpoint."""
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def map(self, params: Iterable[MappedParam]) -> None:
        """Say which parameters there are, so that `slice` finds their HF tensors.

        Raises:
            CheckpointError: a tensor is missing, incomplete or of another shape; a data file is
                missing or too short.
        """
        params = list(params)
        for key, depth in {param.key: len(param.stack_shape) for param in params}.items():
            self._read_chunks(key, depth)
        for param in params:
            expected = (*param.stack_shape, *param.full_shape)
            found = tuple(self._entry(param.key).size)
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: tensor {param.key} has shape {list(found)}, the configuration "
                    f"asks for {list(expected)}"
                )
            chunks = self._chunks.get((param.key, param.stack_index), [])
            sizes = (math.prod(b - a for a, b in chunk.bounds) for chunk in chunks)
            if sum(sizes) != math.prod(param.full_shape):
                raise CheckpointError(f"{self.path}: tensor {param.key} is incomplete")
            self._params |= dict.fromkeys(param.hf_names, param)
        self._check_files()

    def _read_chunks(self, key: str, depth: int) -> None:
        """Sort the chunks of a tensor, whose first `depth` axes are a stack, by parameter."""
        entry = self._entry(key)
        for chunk in entry.chunks:
            info = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            bounds = [(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True)]
            stored = _StoredChunk(
                tuple(bounds[depth:]),
                entry.properties.dtype,
                self.path / info.relative_path,
                info.offset,
                info.length,
            )
            self._chunks.setdefault((key, tuple(chunk.offsets[:depth])), []).append(stored)

    def _check_files(self) -> None:
        ends: dict[Path, int] = {}
        for chunk in (chunk for chunks in self._chunks.values() for chunk in chunks):
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.length)
        for file, end in ends.items():
            if not file.is_file():
                raise CheckpointError(f"{file}: no such file, but {INDEX_FILE} names it")
            if file.stat().st_size < end:
                raise CheckpointError(f"{file}: truncated ({file.stat().st_size} of {end} bytes)")

    def slice(self, name: str) -> _HFSlice:
        """An HF tensor: index it to read."""
        param = self._params[name]
        full = _FullParam(
            param.full_shape,
            self._entry(param.key).properties.dtype,
            self._chunks[param.key, param.stack_index],
        )
        return _HFSlice(param, name, full)

    def locate(self, name: str) -> Path:
        """The folder: a tensor lies in several of its files."""
        return self.path

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.path}: tensor {key} is missing")
        return entry


def open_megatron_checkpoint(
    path: Path, *, check: bool = True
) -> tuple[MegatronTensors, dict[str, MappedParam]]:
    """Open a Megatron checkpoint and check that it holds the model that its HF files describe.

    Args:
        check: read all files against their sums first; collective over all ranks of a job.

    Returns:
        Its tensors, and its parameters by Megatron name.

    Raises:
        CheckpointError: not a Megatron checkpoint, an incomplete, damaged or contradictory one.
    """
    tensors = MegatronTensors(path, check=check)
    config = read_hf_config(path / HF_FOLDER)
    params = stored_params(config.family, config.shape(tensors.padded_vocab_size))
    tensors.map(params.values())
    return tensors, params
