"""Hugging Face tensors and Megatron parameters: one table per model family.

A family is a tuple of rows (Megatron name, kind, HF names); `{i}` stands for the layer, counted
over the whole model. The kind says how the HF tensors are laid out inside the Megatron parameter
and how that parameter is cut over tensor-parallel (TP) ranks. With h = hidden size, d = head size,
n = attention heads, g = query groups, f = feed-forward size:

- grouped QKV. HF: q [n*d, h], k [g*d, h], v [g*d, h]. Megatron: rows ordered by query group, each
  group holding its n/g query heads, then its key head, then its value head: [g * (n/g + 2) * d, h].
  A TP rank owns g/tp whole groups, so its rows are one contiguous run of each HF tensor,
  interleaved.
- gate/up. HF: gate [f, h], up [f, h]. Megatron: a TP rank holds its f/tp gate rows, then its f/tp
  up rows. The concatenation happens per rank, never over the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide the layout of a checkpoint; `padded_vocab_size` is Megatron's."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    hf_vocab_size: int
    padded_vocab_size: int
    tied_embeddings: bool

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups


class TensorSlice(Protocol):
    """A tensor that is read where it is indexed, such as a safetensors slice."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor: ...


HFShapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Kind:
    """How the HF tensors of one Megatron parameter are laid out in it.

    Attributes:
        hf_shapes: shapes that the HF tensors must have.
        read_shard: (HF slices, shape, tp_rank, tp_size) -> this rank's Megatron parameter.
        join_shards: (parameters of all TP ranks, shape) -> the HF tensors, complete.
    """

    hf_shapes: Callable[[ModelShape], HFShapes]
    read_shard: Callable[[Sequence[TensorSlice], ModelShape, int, int], Tensor]
    join_shards: Callable[[Sequence[Tensor], ModelShape], tuple[Tensor, ...]]


def _part(size: int, tp_rank: int, tp_size: int) -> slice:
    assert size % tp_size == 0
    return slice(size // tp_size * tp_rank, size // tp_size * (tp_rank + 1))


def _replicated(size: Callable[[ModelShape], int]) -> Kind:
    """A vector that every TP rank holds whole."""
    return Kind(
        hf_shapes=lambda shape: ((size(shape),),),
        read_shard=lambda hf, shape, tp_rank, tp_size: hf[0][:],
        join_shards=lambda shards, shape: (shards[0],),
    )


def _read_vocab(hf: Sequence[TensorSlice], shape: ModelShape, tp_rank: int, tp_size: int) -> Tensor:
    part = _part(shape.padded_vocab_size, tp_rank, tp_size)
    rows = hf[0][min(part.start, shape.hf_vocab_size) : min(part.stop, shape.hf_vocab_size)]
    padding = rows.new_zeros(part.stop - part.start - rows.shape[0], shape.hidden_size)
    return torch.cat([rows, padding])


# Rows of the vocabulary, padded with zeros from hf_vocab_size to padded_vocab_size, cut by rows.
VOCABULARY = Kind(
    hf_shapes=lambda shape: ((shape.hf_vocab_size, shape.hidden_size),),
    read_shard=_read_vocab,
    join_shards=lambda shards, shape: (torch.cat(list(shards))[: shape.hf_vocab_size],),
)


def _input_parallel(input_size: Callable[[ModelShape], int]) -> Kind:
    """[h, input_size], cut by columns: the weight of a Megatron row-parallel layer."""
    return Kind(
        hf_shapes=lambda shape: ((shape.hidden_size, input_size(shape)),),
        read_shard=lambda hf, shape, tp_rank, tp_size: hf[0][
            :, _part(input_size(shape), tp_rank, tp_size)
        ],
        join_shards=lambda shards, shape: (torch.cat(list(shards), dim=1),),
    )


def _read_qkv(hf: Sequence[TensorSlice], shape: ModelShape, tp_rank: int, tp_size: int) -> Tensor:
    groups = _part(shape.num_query_groups, tp_rank, tp_size)
    per_group = (shape.heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim)
    parts = [
        tensor[groups.start * rows : groups.stop * rows].unflatten(0, (-1, rows))
        for tensor, rows in zip(hf, per_group, strict=True)
    ]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _join_qkv(shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
    per_group = (shape.heads_per_group * shape.head_dim, shape.head_dim, shape.head_dim)
    grouped = torch.cat(list(shards)).unflatten(0, (shape.num_query_groups, -1))
    return tuple(part.flatten(0, 1) for part in grouped.split(per_group, dim=1))


GROUPED_QKV = Kind(
    hf_shapes=lambda shape: (
        (shape.num_attention_heads * shape.head_dim, shape.hidden_size),
        (shape.num_query_groups * shape.head_dim, shape.hidden_size),
        (shape.num_query_groups * shape.head_dim, shape.hidden_size),
    ),
    read_shard=_read_qkv,
    join_shards=_join_qkv,
)


def _join_gate_up(shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
    halves = [shard.chunk(2) for shard in shards]
    return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


GATE_UP = Kind(
    hf_shapes=lambda shape: ((shape.ffn_hidden_size, shape.hidden_size),) * 2,
    read_shard=lambda hf, shape, tp_rank, tp_size: torch.cat(
        [tensor[_part(shape.ffn_hidden_size, tp_rank, tp_size)] for tensor in hf]
    ),
    join_shards=_join_gate_up,
)

HIDDEN_VECTOR = _replicated(lambda shape: shape.hidden_size)
HEAD_VECTOR = _replicated(lambda shape: shape.head_dim)
ATTENTION_OUTPUT = _input_parallel(lambda shape: shape.num_attention_heads * shape.head_dim)
MLP_OUTPUT = _input_parallel(lambda shape: shape.ffn_hidden_size)

Row = tuple[str, Kind, tuple[str, ...]]

_LAYER = "model.layers.{i}."
_MEGATRON_LAYER = "decoder.layers.{i}."

QWEN3: tuple[Row, ...] = (
    ("embedding.word_embeddings.weight", VOCABULARY, ("model.embed_tokens.weight",)),
    (
        _MEGATRON_LAYER + "input_layernorm.weight",
        HIDDEN_VECTOR,
        (_LAYER + "input_layernorm.weight",),
    ),
    (
        _MEGATRON_LAYER + "self_attention.linear_qkv.weight",
        GROUPED_QKV,
        tuple(_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    (
        _MEGATRON_LAYER + "self_attention.q_layernorm.weight",
        HEAD_VECTOR,
        (_LAYER + "self_attn.q_norm.weight",),
    ),
    (
        _MEGATRON_LAYER + "self_attention.k_layernorm.weight",
        HEAD_VECTOR,
        (_LAYER + "self_attn.k_norm.weight",),
    ),
    (
        _MEGATRON_LAYER + "self_attention.linear_proj.weight",
        ATTENTION_OUTPUT,
        (_LAYER + "self_attn.o_proj.weight",),
    ),
    (
        _MEGATRON_LAYER + "pre_mlp_layernorm.weight",
        HIDDEN_VECTOR,
        (_LAYER + "post_attention_layernorm.weight",),
    ),
    (
        _MEGATRON_LAYER + "mlp.linear_fc1.weight",
        GATE_UP,
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    ),
    (
        _MEGATRON_LAYER + "mlp.linear_fc2.weight",
        MLP_OUTPUT,
        (_LAYER + "mlp.down_proj.weight",),
    ),
    ("decoder.final_layernorm.weight", HIDDEN_VECTOR, ("model.norm.weight",)),
    ("output_layer.weight", VOCABULARY, ("lm_head.weight",)),
)

FAMILIES: dict[str, tuple[Row, ...]] = {"qwen3": QWEN3}


@dataclass(frozen=True)
class MappedParam:
    """One Megatron parameter of a concrete model and the HF tensors that it is made of."""

    kind: Kind
    hf_names: tuple[str, ...]
    shape: ModelShape

    @property
    def hf_shapes(self) -> HFShapes:
        return self.kind.hf_shapes(self.shape)

    def read_shard(self, hf: Sequence[TensorSlice], tp_rank: int, tp_size: int) -> Tensor:
        """This TP rank's parameter, reading only the slices of the HF tensors that it needs."""
        return self.kind.read_shard(hf, self.shape, tp_rank, tp_size)

    def join_shards(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """The complete HF tensors by name, from the parameters of all TP ranks in rank order."""
        return dict(zip(self.hf_names, self.kind.join_shards(shards, self.shape), strict=True))


def map_params(family: str, shape: ModelShape) -> dict[str, MappedParam]:
    """Every Megatron parameter name of a model, layers counted globally, with its HF tensors.

    With tied embeddings `output_layer.weight`, which only a last pipeline stage of its own holds,
    maps to the embedding's HF tensor.
    """
    return dict(_expand(FAMILIES[family], shape))


def _expand(rows: tuple[Row, ...], shape: ModelShape) -> Iterator[tuple[str, MappedParam]]:
    for name, kind, hf_names in rows:
        if name == "output_layer.weight" and shape.tied_embeddings:
            hf_names = rows[0][2]
        for i in range(shape.num_layers if "{i}" in name else 1):
            yield name.format(i=i), MappedParam(kind, tuple(h.format(i=i) for h in hf_names), shape)
