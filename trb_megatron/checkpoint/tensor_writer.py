"""Writing a model as a Megatron checkpoint, block by block, in one process without the model.

`dist_checkpointing` saves whole state dicts; here a chunk is made when its turn comes to be
written, so that writing needs memory for one chunk at a time. `megatron_tensors` reads the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from trb_megatron.huggingface.param_mapping import Chunk, MappedParam
from trb_megatron.huggingface.tensors import HFTensors

_COMMON_FILE = "common.pt"


class _ChunkPlanner(SavePlanner):
    """Plans one write per chunk and makes its tensor when it is written."""

    def __init__(
        self, writes: Mapping[MetadataIndex, _Write], on_write: Callable[[int], None]
    ) -> None:
        self._writes = writes
        self._on_write = on_write

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(index, WriteItemType.SHARD, tensor_data=write.describe())
                for index, write in self._writes.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, Any] = {}
        for index, write in self._writes.items():
            data = write.describe()
            entry = TensorStorageMetadata(data.properties, data.size, [])
            tensors.setdefault(index.fqn, entry).chunks.append(data.chunk)
        return all_plans, Metadata(state_dict_metadata=tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self._writes[write_item.index].read()
        self._on_write(tensor.nbytes)
        return tensor


@dataclass(frozen=True)
class _Write:
    """A chunk, the type that its tensor is stored in, and the parameter that it belongs to."""

    chunk: Chunk
    dtype: torch.dtype
    param: MappedParam
    tensors: HFTensors

    def describe(self) -> TensorWriteData:
        sizes = ChunkStorageMetadata(torch.Size(self.chunk.offsets), torch.Size(self.chunk.sizes))
        properties = TensorProperties(dtype=self.dtype)
        return TensorWriteData(sizes, properties, torch.Size(self.chunk.global_shape))

    def read(self) -> Tensor:
        slices = [self.tensors.slice(name) for name in self.param.hf_names]
        return self.chunk.read(slices).to(self.dtype)


def stored_dtypes(
    params: Iterable[MappedParam], hf_dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """The type of each tensor of a Megatron checkpoint: one that holds all of its HF tensors."""
    dtypes: dict[str, torch.dtype] = {}
    for param in params:
        found = [hf_dtypes[name] for name in param.hf_names]
        known = [dtypes[param.key]] if param.key in dtypes else []
        dtypes[param.key] = reduce(torch.promote_types, found + known)
    return dtypes


def write_checkpoint(
    folder: Path,
    params: Mapping[str, MappedParam],
    tensors: HFTensors,
    *,
    tp_size: int,
    on_write: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write HF tensors as a Megatron checkpoint of the model only, in one process.

    Needs memory for one chunk at a time. `on_write` gets the bytes of each chunk.

    Args:
        folder: exists; the index is the last of its files to appear.
        tp_size: how many chunks a parameter that ranks share is cut into.
    """
    names = [name for param in params.values() for name in param.hf_names]
    dtypes = stored_dtypes(params.values(), tensors.dtypes(names))
    writes = {
        MetadataIndex(chunk.key, torch.Size(chunk.offsets)): _Write(
            chunk, dtypes[chunk.key], param, tensors
        )
        for param in params.values()
        for chunk in param.chunks(tp_size)
    }
    # What isn't tensors; megatron-core 0.16 needs the file, newer versions read it.
    torch.save({}, folder / _COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    dcp.save(
        {},
        storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
        planner=_ChunkPlanner(writes, on_write),
        no_dist=True,
    )
