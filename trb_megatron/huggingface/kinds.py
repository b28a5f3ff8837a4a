"""How the tensors of a Hugging Face checkpoint lie in the parameters of Megatron.

With h = hidden size, d = head size, n = attention heads, g = query groups, f = feed-forward size:

- grouped QKV. HF: q [n*d, h], k [g*d, h], v [g*d, h]. Megatron: rows ordered by query group, each
  group holding its n/g query heads, then its key head, then its value head: [g * (n/g + 2) * d, h].
  TP ranks cut these rows evenly. Where tp divides g, a rank owns g/tp whole groups: one contiguous
  run of each HF tensor, interleaved. Where g divides tp, tp/g ranks share the rows of a group, cut
  anywhere, even inside a head. Biases are laid out the same way, without h.
- gate/up. HF: gate [f, h], up [f, h]. Megatron: a TP rank holds its f/tp gate rows, then its f/tp
  up rows. The concatenation happens per rank, never over the whole matrix; only a checkpoint, which
  knows no ranks, holds [gate; up], as two pieces that are cut over the ranks each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide the layout of a checkpoint; `padded_vocab_size` is Megatron's.

    `num_experts` and `expert_ffn_hidden_size` are 0 in a dense model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    hf_vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool
    num_experts: int = 0
    expert_ffn_hidden_size: int = 0

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def rows_per_group(self) -> tuple[int, int, int]:
        """Rows of query, key and value in one query group of the grouped QKV layout."""
        return self.heads_per_group * self.head_dim, self.head_dim, self.head_dim


class TensorSlice(Protocol):
    """A tensor that is read where it is indexed, such as a safetensors slice."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """How the HF tensors of one Megatron parameter are laid out in it.

    Attributes:
        hf_shapes: shapes that the HF tensors must have.
        full_shape: of the parameter at TP size 1, which is also how a checkpoint holds it.
        read_piece: (HF slices, shape, tp_rank, tp_size, piece) -> that piece of a TP rank's part.
        read_hf: (the full parameter, shape, j) -> its j-th HF tensor, complete.
        cut_axis: the axis that TP ranks share; None when each holds the whole.
        num_pieces: how many pieces, one after the other on `cut_axis`, are cut each on its own.
    """

    hf_shapes: Callable[[ModelShape], tuple[Shape, ...]]
    full_shape: Callable[[ModelShape], Shape]
    read_piece: Callable[[Sequence[TensorSlice], ModelShape, int, int, int], Tensor]
    read_hf: Callable[[TensorSlice, ModelShape, int], Tensor]
    cut_axis: int | None
    num_pieces: int = 1


def part_of_rank(size: int, tp_rank: int, tp_size: int) -> slice:
    """The part of an axis of this size that a tensor-parallel rank owns."""
    assert size % tp_size == 0
    return slice(size // tp_size * tp_rank, size // tp_size * (tp_rank + 1))


def _replicated(full_shape: Callable[[ModelShape], Shape]) -> Kind:
    """A tensor that every TP rank holds whole."""
    return Kind(
        hf_shapes=lambda shape: (full_shape(shape),),
        full_shape=full_shape,
        read_piece=lambda hf, shape, tp_rank, tp_size, piece: hf[0][:],
        read_hf=lambda full, shape, j: full[:],
        cut_axis=None,
    )


def _read_vocab(
    hf: Sequence[TensorSlice], shape: ModelShape, tp_rank: int, tp_size: int, piece: int
) -> Tensor:
    part = part_of_rank(shape.padded_vocab_size, tp_rank, tp_size)
    rows = hf[0][min(part.start, shape.hf_vocab_size) : min(part.stop, shape.hf_vocab_size)]
    num_padding = part.stop - part.start - rows.shape[0]
    if num_padding == 0:
        return rows
    return torch.cat([rows, rows.new_zeros(num_padding, shape.hidden_size)])


# Rows of the vocabulary, padded with zeros from hf_vocab_size to padded_vocab_size, cut by rows.
VOCABULARY = Kind(
    hf_shapes=lambda shape: ((shape.hf_vocab_size, shape.hidden_size),),
    full_shape=lambda shape: (shape.padded_vocab_size, shape.hidden_size),
    read_piece=_read_vocab,
    read_hf=lambda full, shape, j: full[: shape.hf_vocab_size],
    cut_axis=0,
)


def _input_parallel(input_size: Callable[[ModelShape], int]) -> Kind:
    """[h, input_size], cut by columns: the weight of a Megatron row-parallel layer."""
    return Kind(
        hf_shapes=lambda shape: ((shape.hidden_size, input_size(shape)),),
        full_shape=lambda shape: (shape.hidden_size, input_size(shape)),
        read_piece=lambda hf, shape, tp_rank, tp_size, piece: hf[0][
            :, part_of_rank(input_size(shape), tp_rank, tp_size)
        ],
        read_hf=lambda full, shape, j: full[:],
        cut_axis=1,
    )


def _read_qkv(
    hf: Sequence[TensorSlice], shape: ModelShape, tp_rank: int, tp_size: int, piece: int
) -> Tensor:
    group_size = sum(shape.rows_per_group)
    part = part_of_rank(shape.num_query_groups * group_size, tp_rank, tp_size)
    first, stop = part.start // group_size, -(-part.stop // group_size)
    parts = [
        tensor[first * rows : stop * rows].unflatten(0, (-1, rows))
        for tensor, rows in zip(hf, shape.rows_per_group, strict=True)
    ]
    num_before = part.start - first * group_size
    return torch.cat(parts, dim=1).flatten(0, 1)[num_before:][: part.stop - part.start]


def _split_qkv(full: TensorSlice, shape: ModelShape, j: int) -> Tensor:
    rows, group_size = shape.rows_per_group, sum(shape.rows_per_group)
    starts = [group * group_size + sum(rows[:j]) for group in range(shape.num_query_groups)]
    return torch.cat([full[start : start + rows[j]] for start in starts])


def _grouped_qkv(row_shape: Callable[[ModelShape], Shape]) -> Kind:
    """Query, key and value interleaved by query group; `row_shape` is what follows the rows."""
    return Kind(
        hf_shapes=lambda shape: tuple(
            (shape.num_query_groups * rows, *row_shape(shape)) for rows in shape.rows_per_group
        ),
        full_shape=lambda shape: (
            shape.num_query_groups * sum(shape.rows_per_group),
            *row_shape(shape),
        ),
        read_piece=_read_qkv,
        read_hf=_split_qkv,
        cut_axis=0,
    )


def _gate_up(ffn_size: Callable[[ModelShape], int]) -> Kind:
    """Gate and up projection, each cut by rows."""
    return Kind(
        hf_shapes=lambda shape: ((ffn_size(shape), shape.hidden_size),) * 2,
        full_shape=lambda shape: (2 * ffn_size(shape), shape.hidden_size),
        read_piece=lambda hf, shape, tp_rank, tp_size, piece: hf[piece][
            part_of_rank(ffn_size(shape), tp_rank, tp_size)
        ],
        read_hf=lambda full, shape, j: full[j * ffn_size(shape) : (j + 1) * ffn_size(shape)],
        cut_axis=0,
        num_pieces=2,
    )


HIDDEN_VECTOR = _replicated(lambda shape: (shape.hidden_size,))
HEAD_VECTOR = _replicated(lambda shape: (shape.head_dim,))
ROUTER = _replicated(lambda shape: (shape.num_experts, shape.hidden_size))
GROUPED_QKV = _grouped_qkv(lambda shape: (shape.hidden_size,))
GROUPED_QKV_BIAS = _grouped_qkv(lambda shape: ())
ATTENTION_OUTPUT = _input_parallel(lambda shape: shape.num_attention_heads * shape.head_dim)
GATE_UP = _gate_up(lambda shape: shape.ffn_hidden_size)
MLP_OUTPUT = _input_parallel(lambda shape: shape.ffn_hidden_size)
EXPERT_GATE_UP = _gate_up(lambda shape: shape.expert_ffn_hidden_size)
EXPERT_OUTPUT = _input_parallel(lambda shape: shape.expert_ffn_hidden_size)
