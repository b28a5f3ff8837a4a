"""Running a model over a batch through the pipeline: with a cache, without gradient, with gradient.

Shapes: T positions of a microbatch, N packed tokens, H hidden size, U this rank's vocabulary shard.
Megatron's own order for activations is [T, B, H]; packed rows have B = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from trb_megatron.batch import Microbatch
from trb_megatron.distributed.layout import ParallelLayout
from trb_megatron.distributed.pipeline import StageLink
from trb_megatron.models.gpt import HiddenStateGPTModel
from trb_megatron.models.kv_cache import PagedKVCache, PageTable, RaggedBatch
from trb_megatron.models.layers import PackedSequences
from trb_megatron.models.rotary import Rotation

LossFunction = Callable[[Tensor, Microbatch], tuple[Tensor, dict[str, Tensor]]]
"""(gathered hidden states at the loss positions [N, H], microbatch) -> (loss sum, metrics)."""


class CachedModel:
    """A model and its cache: runs new tokens of many sequences through all pipeline stages.

    Every rank of a model replica makes the same calls, with gradients disabled. Activations travel
    by point-to-point sends over the pipeline group.
    """

    def __init__(
        self, model: HiddenStateGPTModel, page_table: PageTable, layout: ParallelLayout
    ) -> None:
        self.model = model
        first = model.decoder.layers[0].layer_number
        layer_numbers = range(first, first + len(model.decoder.layers))
        self.cache = PagedKVCache(model.config, layer_numbers, page_table)
        self._link = StageLink(layout)
        self._layout = layout

    def forward(self, batch: RaggedBatch, tokens_N: Tensor) -> Tensor | None:
        """Run `batch.num_tokens` packed token ids, reading and growing the cache.

        Returns:
            Final hidden states [N, H] of the unpadded tokens on the last stage, None elsewhere.
        """
        model, layout = self.model, self._layout
        self.cache.batch = batch
        num_rows = batch.positions_N.numel()
        if not layout.is_first_stage:
            shape = (num_rows // model.num_sequence_shards, 1, model.config.hidden_size)
            model.set_input_tensor(self._link.receive(shape, model.config.params_dtype))
        tokens_1N = F.pad(tokens_N, (0, num_rows - tokens_N.numel()))[None]
        hidden_N1H = model(
            tokens_1N,
            batch.positions_N[None],
            None,
            decoder_input=model.embed(tokens_1N),
            inference_context=self.cache,
        )
        if not layout.is_last_stage:
            self._link.send(hidden_N1H)
            return None
        return model.gather_hidden(hidden_N1H)[: batch.num_tokens, 0]

    def project(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, U] of hidden states, on the last stage."""
        return self.model.project(hidden_NH)


def forward_microbatch(model: Any, microbatch: Microbatch) -> Tensor:
    """The last stage's hidden states of a packed row, or what goes to the next stage."""
    tokens_1T, positions_1T = microbatch.tokens_T[None], microbatch.positions_T[None]
    # Transformer Engine reads them on the GPU, our own attention on the host.
    device = tokens_1T.device if HAVE_TE else "cpu"
    cu_lengths = torch.tensor(microbatch.cu_lengths, dtype=torch.int32, device=device)
    packing = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_lengths,
        cu_seqlens_kv=cu_lengths,
        max_seqlen_q=microbatch.max_length,
        max_seqlen_kv=microbatch.max_length,
        rotation=Rotation(microbatch.positions_T),
    )
    return model(tokens_1T, positions_1T, None, packed_seq_params=packing)


def _loss_hidden(model: HiddenStateGPTModel, hidden: Tensor, microbatch: Microbatch) -> Tensor:
    """Hidden states at the loss positions [N, H], sequences in order."""
    return model.gather_hidden(hidden)[microbatch.loss_mask_T, 0]


def forward_hidden(
    model: HiddenStateGPTModel, microbatches: Sequence[Microbatch], *, to_host: bool = False
) -> list[Tensor]:
    """Final hidden states at the loss positions of each microbatch, without gradient.

    Collective over the model replica (Megatron's forward-only schedule). With `to_host` those of a
    GPU go to pinned host memory as soon as they are there: 256 responses of 7,168 tokens with
    H = 4,096 are 15 GB in bf16.

    Returns:
        One [N, H] per microbatch on the last stage, replicated over tensor-parallel ranks; an empty
        list on other stages.
    """

    def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        microbatch = next(iterator)

        def keep(hidden: Tensor, non_loss_data: bool = True) -> Tensor:
            hidden_NH = _loss_hidden(model, hidden, microbatch)
            return copy_to_host(hidden_NH) if to_host else hidden_NH

        return forward_microbatch(model, microbatch), keep

    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=len(microbatches[0].tokens_T),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )


def copy_to_host(hidden_NH: Tensor) -> Tensor:
    """Pinned host memory that a GPU's tensor is on its way to; a CPU's tensor as it is.

    Only the same stream may read it before the host has waited for the device: the loss copies it
    back in stream order.
    """
    if not hidden_NH.is_cuda:
        return hidden_NH
    pinned_NH = torch.empty_like(hidden_NH, device="cpu", pin_memory=True)
    return pinned_NH.copy_(hidden_NH, non_blocking=True)


def forward_backward(
    model: Any, microbatches: Sequence[Microbatch], loss_function: LossFunction
) -> list[dict[str, Tensor]]:
    """Forward and backward over all microbatches, gradients summed and divided by the global count.

    Collective over all ranks. The loss function returns a sum over its tokens; Megatron divides the
    gradients by the number of loss tokens of the global batch (`calculate_per_token_loss`), so the
    result does not depend on microbatches, data parallelism or what fills them up.

    Args:
        model: the student in Megatron's DistributedDataParallel.

    Returns:
        The metrics of each microbatch on the last stage, an empty list on other stages.
    """

    def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        microbatch = next(iterator)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            inner = unwrap_model(model)
            loss_sum, metrics = loss_function(_loss_hidden(inner, hidden, microbatch), microbatch)
            num_tokens = microbatch.loss_mask_T.sum().to(torch.int)
            return loss_sum, num_tokens, metrics

        return forward_microbatch(model, microbatch), loss

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=len(microbatches[0].tokens_T),
        micro_batch_size=1,
    )
