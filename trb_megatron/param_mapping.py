"""Hugging Face tensors and Megatron parameters: one table per model family.

A family is a tuple of rows (Megatron name, kind, HF names); `{i}` stands for the layer, counted
over the whole model, `{e}` for the expert of a mixture-of-experts layer. Megatron names are those
of its distributed checkpoints, where a norm in front of a linear layer belongs to that layer. The
kind says how the HF tensors are laid out inside the Megatron parameter and how that parameter is
cut over tensor-parallel (TP) ranks. With h = hidden size, d = head size, n = attention heads,
g = query groups, f = feed-forward size:

- grouped QKV. HF: q [n*d, h], k [g*d, h], v [g*d, h]. Megatron: rows ordered by query group, each
  group holding its n/g query heads, then its key head, then its value head: [g * (n/g + 2) * d, h].
  A TP rank owns g/tp whole groups, so its rows are one contiguous run of each HF tensor,
  interleaved. Biases are laid out the same way, without h.
- gate/up. HF: gate [f, h], up [f, h]. Megatron: a TP rank holds its f/tp gate rows, then its f/tp
  up rows. The concatenation happens per rank, never over the whole matrix; only a checkpoint, which
  knows no ranks, holds [gate; up], as two pieces that are cut over the ranks each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
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


def _part(size: int, tp_rank: int, tp_size: int) -> slice:
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
    part = _part(shape.padded_vocab_size, tp_rank, tp_size)
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
            :, _part(input_size(shape), tp_rank, tp_size)
        ],
        read_hf=lambda full, shape, j: full[:],
        cut_axis=1,
    )


def _read_qkv(
    hf: Sequence[TensorSlice], shape: ModelShape, tp_rank: int, tp_size: int, piece: int
) -> Tensor:
    groups = _part(shape.num_query_groups, tp_rank, tp_size)
    parts = [
        tensor[groups.start * rows : groups.stop * rows].unflatten(0, (-1, rows))
        for tensor, rows in zip(hf, shape.rows_per_group, strict=True)
    ]
    return torch.cat(parts, dim=1).flatten(0, 1)


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
            _part(ffn_size(shape), tp_rank, tp_size)
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

Row = tuple[str, Kind, tuple[str, ...]]

_EMBEDDING = "model.embed_tokens.weight"
_HF = "model.layers.{i}."
_HF_EXPERT = _HF + "mlp.experts.{e}."
_LAYER = "decoder.layers.{i}."
_EXPERT = _LAYER + "mlp.experts.local_experts.{e}."

_OUTSIDE_THE_LAYERS: tuple[Row, ...] = (
    ("embedding.word_embeddings.weight", VOCABULARY, (_EMBEDDING,)),
    ("decoder.final_layernorm.weight", HIDDEN_VECTOR, ("model.norm.weight",)),
    ("output_layer.weight", VOCABULARY, ("lm_head.weight",)),
)
_ATTENTION: tuple[Row, ...] = (
    (
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        HIDDEN_VECTOR,
        (_HF + "input_layernorm.weight",),
    ),
    (
        _LAYER + "self_attention.linear_qkv.weight",
        GROUPED_QKV,
        tuple(_HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    (
        _LAYER + "self_attention.linear_proj.weight",
        ATTENTION_OUTPUT,
        (_HF + "self_attn.o_proj.weight",),
    ),
)
_QKV_BIAS: Row = (
    _LAYER + "self_attention.linear_qkv.bias",
    GROUPED_QKV_BIAS,
    tuple(_HF + f"self_attn.{x}_proj.bias" for x in "qkv"),
)
_QK_NORMS: tuple[Row, ...] = tuple(
    (
        _LAYER + f"self_attention.{x}_layernorm.weight",
        HEAD_VECTOR,
        (_HF + f"self_attn.{x}_norm.weight",),
    )
    for x in "qk"
)
_MLP: tuple[Row, ...] = (
    (
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        HIDDEN_VECTOR,
        (_HF + "post_attention_layernorm.weight",),
    ),
    (
        _LAYER + "mlp.linear_fc1.weight",
        GATE_UP,
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
    ),
    (_LAYER + "mlp.linear_fc2.weight", MLP_OUTPUT, (_HF + "mlp.down_proj.weight",)),
)
_EXPERTS: tuple[Row, ...] = (
    (
        _LAYER + "pre_mlp_layernorm.weight",
        HIDDEN_VECTOR,
        (_HF + "post_attention_layernorm.weight",),
    ),
    (_LAYER + "mlp.router.weight", ROUTER, (_HF + "mlp.gate.weight",)),
    (
        _EXPERT + "linear_fc1.weight",
        EXPERT_GATE_UP,
        (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"),
    ),
    (_EXPERT + "linear_fc2.weight", EXPERT_OUTPUT, (_HF_EXPERT + "down_proj.weight",)),
)

LLAMA = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, *_MLP)
MISTRAL = LLAMA
QWEN2 = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, _QKV_BIAS, *_MLP)
QWEN3 = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, *_QK_NORMS, *_MLP)
QWEN3_MOE = (*_OUTSIDE_THE_LAYERS, *_ATTENTION, *_QK_NORMS, *_EXPERTS)

FAMILIES: dict[str, tuple[Row, ...]] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
"""The table of each `model_type` of an HF config.json."""


def has_parameter(family: str, ending: str) -> bool:
    """Whether a family's layers have a parameter whose Megatron name ends so."""
    return any(name.endswith(ending) for name, _, _ in FAMILIES[family])


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
            part = _part(size, tp_rank, tp_size)
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
        yield name, kind, (_EMBEDDING,) if is_tied else hf_names


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
