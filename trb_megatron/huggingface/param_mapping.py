"""The parameters of a concrete model, and the HF tensors that each is made of.

`map_params` applies the table of a family (`families`) to the sizes of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from trb_megatron.huggingface.families import EMBEDDING, FAMILIES, Row
from trb_megatron.huggingface.kinds import Kind, ModelShape, Shape, TensorSlice, part_of_rank


@dataclass(frozen=True)
class Chunk:
    """A block of a checkpoint's tensor, as one TP rank would write it.

    `offsets` and `sizes` count within the tensor named `key`, whose shape is `global_shape`; `read`
    makes the block, of shape `sizes`, of the slices of the parameter's HF tensors.
    """

    key: str
    global_shape: Shape
    offsets: Shape
    sizes: Shape
    read: Callable[[Sequence[TensorSlice]], Tensor]


@dataclass(frozen=True)
class MappedParam:
    """One Megatron parameter of a concrete model and the HF tensors that it is made of.

    A checkpoint stacks the parameters of all layers (and experts) in one tensor, named `key`:
    `stack_shape` are its leading axes, `stack_index` is where this one lies. Both are empty for a
    parameter outside the layers.
    """

    kind: Kind
    hf_names: tuple[str, ...]
    shape: ModelShape
    key: str
    stack_shape: Shape
    stack_index: Shape

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return self.kind.hf_shapes(self.shape)

    @property
    def full_shape(self) -> Shape:
        return self.kind.full_shape(self.shape)

    def read_shard(self, hf: Sequence[TensorSlice], tp_rank: int, tp_size: int) -> Tensor:
        """This TP rank's parameter, reading only the slices of the HF tensors that it needs."""
        return self._join_pieces(
            self.kind.read_piece(hf, self.shape, tp_rank, tp_size, piece)
            for piece in range(self.kind.num_pieces)
        )

    def join_shards(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The complete HF tensors by name, from the parameters of all TP ranks in rank order."""
        axis = self.kind.cut_axis
        if axis is None or len(shards) == 1:
            return self.split(shards[0])
        pieces = zip(
            *(shard.chunk(self.kind.num_pieces, dim=axis) for shard in shards), strict=True
        )
        return self.split(torch.cat([part for piece in pieces for part in piece], dim=axis))

    def split(self, full: TensorSlice) -> dict[str, Tensor]:
        """The HF tensors by name, from the parameter at TP size 1."""
        return {name: self.read_hf(full, name) for name in self.hf_names}

    def read_hf(self, full: TensorSlice, hf_name: str) -> Tensor:
        """One HF tensor, from the parameter at TP size 1."""
        return self.kind.read_hf(full, self.shape, self.hf_names.index(hf_name))

    def _join_pieces(self, pieces: Iterable[Tensor]) -> Tensor:
        first, *rest = pieces
        if not rest:
            return first
        assert self.kind.cut_axis is not None
        return torch.cat([first, *rest], dim=self.kind.cut_axis)

    def chunks(self, tp_size: int) -> Iterator[Chunk]:
        """The blocks that the ranks of a TP group write into a checkpoint, each once."""
        num_ranks = 1 if self.kind.cut_axis is None else tp_size
        for piece, tp_rank in product(range(self.kind.num_pieces), range(num_ranks)):
            index = self._piece_index(piece, tp_rank, tp_size)
            bounds = [part.indices(n)[:2] for part, n in zip(index, self.full_shape, strict=True)]
            lengths = (stop - start for start, stop in bounds)
            yield Chunk(
                key=self.key,
                global_shape=(*self.stack_shape, *self.full_shape),
                offsets=(*self.stack_index, *(start for start, _ in bounds)),
                sizes=(*(1 for _ in self.stack_shape), *lengths),
                read=partial(self._read_chunk, tp_rank, tp_size, piece),
            )

    def _read_chunk(
        self, tp_rank: int, tp_size: int, piece: int, hf: Sequence[TensorSlice]
    ) -> Tensor:
        block = self.kind.read_piece(hf, self.shape, tp_rank, tp_size, piece)
        return block[(None,) * len(self.stack_shape)]

    def _piece_index(self, piece: int, tp_rank: int, tp_size: int) -> tuple[slice, ...]:
        """Where a piece of a TP rank's part lies in the full parameter."""
        index = [slice(None)] * len(self.full_shape)
        axis = self.kind.cut_axis
        if axis is not None:
            size = self.full_shape[axis] // self.kind.num_pieces
            part = part_of_rank(size, tp_rank, tp_size)
            index[axis] = slice(piece * size + part.start, piece * size + part.stop)
        return tuple(index)


def map_params(family: str, shape: ModelShape) -> dict[str, MappedParam]:
    """Every Megatron parameter name of a model, layers counted globally, with its HF tensors.

    With tied embeddings `output_layer.weight`, which only a last pipeline stage of its own holds
    and a checkpoint doesn't, maps to the embedding's HF tensor.
    """
    return {
        name.format(i=layer, e=expert): MappedParam(
            kind,
            tuple(hf_name.format(i=layer, e=expert) for hf_name in hf_names),
            shape,
            *_checkpoint_place(name, shape, layer, expert),
        )
        for name, kind, hf_names in _rows(family, shape)
        for layer in range(shape.num_layers if "{i}" in name else 1)
        for expert in range(shape.num_experts if "{e}" in name else 1)
    }


def stored_params(family: str, shape: ModelShape) -> dict[str, MappedParam]:
    """`map_params` without the second use of a tied embedding: each HF tensor appears once."""
    params = map_params(family, shape)
    if shape.tied_embeddings:
        del params["output_layer.weight"]
    return params


def _rows(family: str, shape: ModelShape) -> Iterator[Row]:
    for name, kind, hf_names in FAMILIES[family]:
        is_tied = shape.tied_embeddings and name == "output_layer.weight"
        yield name, kind, (EMBEDDING,) if is_tied else hf_names


def _checkpoint_place(
    name: str, shape: ModelShape, layer: int, expert: int
) -> tuple[str, Shape, Shape]:
    """Key, stack_shape and stack_index of a parameter in a Megatron checkpoint."""
    key = name.replace("layers.{i}", "layers").replace("local_experts.{e}", "experts")
    if "{e}" in name:
        return key, (shape.num_layers, shape.num_experts), (layer, expert)
    if "{i}" in name:
        return key, (shape.num_layers,), (layer,)
    return key, (), ()
