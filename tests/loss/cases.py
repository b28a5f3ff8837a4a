"""Output layers of a student and a teacher, and the fused loss of them on this rank's shards.

Shapes as in `trb_megatron.loss.fused`.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.local_ranks import current_group
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.distributed.vocab_parallel import all_gather
from trb_megatron.loss.fused import fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer

# Each token is a block of its own, with its own collectives: few tokens, few seconds.
NUM_TOKENS, NUM_VALID, NUM_ROWS, WIDTHS = 7, 203, 224, (24, 40)
NUM_DRAWN = 11  # random hidden states, of which the first are used
OPTIONS = LossOptions(top_k=5, temperature=0.8, jsd_weight=0.3, veto_coef=0.4)
DEFAULTS = {"top_k": 16, "temperature": 1.0, "jsd_weight": 0.5, "veto_coef": 0.0}
ALIGNMENTS = (None, StopAlignment((118, 2), (2, 9, 150)))
ONE_TOKEN, SOME_TOKENS, ALL_TOKENS = "one token", "some tokens", "all tokens"
"""How much of it a chunk takes; some are three or four of the seven, by the loss."""
CHUNKS = {
    1: (ONE_TOKEN, SOME_TOKENS, ALL_TOKENS),
    2: (ONE_TOKEN, SOME_TOKENS, ALL_TOKENS),
    4: (ONE_TOKEN, SOME_TOKENS),
    8: (SOME_TOKENS,),
    16: (SOME_TOKENS,),
}
"""Those that are measured, by the tensor-parallel size."""


class Result(NamedTuple):
    """What one call gives."""

    loss_sum: Tensor
    per_token_N: Tensor
    grad_hidden_NH: Tensor
    grad_weight_VH: Tensor
    metrics: dict[str, Tensor]


def build_layers(dtype: torch.dtype = torch.float32) -> list[OutputLayer]:
    """Whole output layers of student and teacher; rows from `NUM_VALID` on are garbage."""
    generator = torch.Generator().manual_seed(5)
    layers = []
    for width in WIDTHS:
        hidden_NH = torch.randn(NUM_DRAWN, width, generator=generator)[:NUM_TOKENS]
        weight_VH = 2 * torch.randn(NUM_ROWS, width, generator=generator) / width**0.5
        weight_VH[NUM_VALID:] = 1e3
        # Stop ids that are likely: their merge then matters.
        weight_VH[[2, 9, 118]] = 0.2 * hidden_NH[[0, 3, 6]]
        layers.append(OutputLayer(hidden_NH.to(dtype), weight_VH.to(dtype)))
    return layers


def token_weights() -> Tensor:
    """A mask and a normalizer, as one might apply them."""
    weights_N = torch.linspace(-1, 2, NUM_TOKENS)
    weights_N[[1, 5]] = 0.0
    return weights_N


def sampled_ids() -> Tensor:
    return torch.arange(NUM_TOKENS) * 26 + 3


def workspace_bytes(chunk: str) -> int:
    """Memory of which so much makes a chunk on this rank's shard."""
    group = current_group()
    num_ranks = 1 if group is None else group.size()
    return {
        ONE_TOKEN: 1,
        SOME_TOKENS: 4 * 10 * NUM_ROWS // num_ranks,
        ALL_TOKENS: 2**30,
    }[chunk]


def settings_of(name: str, **changes: Any) -> FusedLossSettings:
    """How a loss is computed on this rank; all tokens in one chunk unless changed."""
    settings = FusedLossSettings(
        loss=LOSSES[name],
        options=OPTIONS,
        workspace_bytes=workspace_bytes(ALL_TOKENS),
        tp_group=current_group(),
        num_valid=NUM_VALID,
    )
    return dataclasses.replace(settings, **changes)


def evaluate(
    settings: FusedLossSettings,
    layers: list[OutputLayer],
    *,
    ids_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    into_buffer: bool = False,
) -> Result:
    """The fused loss on this rank's shards, differentiated, its weight gradient gathered."""
    group = settings.tp_group
    num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    shards = [weight_VH.chunk(num_ranks)[rank].clone() for _, weight_VH in layers]
    hidden_NH = layers[0].hidden_NH.clone().requires_grad_()
    weight_UH = shards[0].requires_grad_()
    buffer_UH = torch.zeros_like(weight_UH, dtype=torch.float32) if into_buffer else None
    output = fused_loss(
        settings,
        OutputLayer(hidden_NH, weight_UH),
        OutputLayer(layers[1].hidden_NH, shards[1]) if settings.loss.needs_teacher else None,
        token_weights=weights_N,
        sampled_ids=ids_N,
        weight_grad_UH=buffer_UH,
    )
    output.loss_sum.backward()
    grad_UH = weight_UH.grad if buffer_UH is None else buffer_UH
    assert hidden_NH.grad is not None and grad_UH is not None
    assert buffer_UH is None or weight_UH.grad is None
    grad_VH = all_gather(grad_UH, group).flatten(0, 1)
    return Result(
        output.loss_sum.detach(), output.per_token, hidden_NH.grad, grad_VH, output.metrics
    )
