"""Megatron checkpoints of strangers, read without running code that their files bring along.

Some of their files are pickles, which name functions and have them called: the index `.metadata`,
which torch unpickles as it stands, and `common.pt` and the objects between the tensors, which torch
loads. Here a name that such a file has no need of is refused before anything is called. (The states
of FP8 layers, which Transformer Engine would unpickle, are never read: see `models`.)
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from trb_megatron.huggingface.tensors import CheckpointError, check_file_name

INDEX_FILE = ".metadata"

_INDEX_NAMES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def _enum_member(kind: Any, name: Any) -> Any:
    """`getattr` for the one use that an index has of it.

    Python 3.11.0 to 3.11.3 pickle a member of an enumeration as `getattr(its class, its name)`.
    """
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"refused, it asks for the attribute {name!r} of {kind!r}")


class _IndexUnpickler(pickle.Unpickler):
    """Refuses every name but those that an index needs, and data types of torch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused, it asks for {module}.{name}")


def read_index(checkpoint: Path) -> Metadata:
    """The index of a `torch.distributed.checkpoint` folder, read without running code.

    Raises:
        CheckpointError: the index is damaged, asks for something that no index needs, or names a
            data file outside the folder.
    """
    file = checkpoint / INDEX_FILE
    try:
        index = _IndexUnpickler(io.BytesIO(file.read_bytes())).load()
        data_files = {info.relative_path for info in index.storage_data.values()}
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file}: corrupt ({error})") from error
    for name in data_files:
        check_file_name(name, file)
    return index


@contextmanager
def no_code_from(checkpoint: Path) -> Iterator[None]:
    """Check a checkpoint's index; inside, no `torch.load` of this process runs code.

    Torch then builds tensors and plain data only, whatever its caller asks for.

    Raises:
        CheckpointError: as `read_index`.
    """
    read_index(checkpoint)
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
