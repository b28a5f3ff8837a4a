"""Check that Megatron computes what transformers computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.batch import Microbatch
from trb_megatron.distributed import ParallelLayout
from trb_megatron.forward import forward_hidden
from trb_megatron.models import HiddenStateGPTModel, token_multiple


def forward_logits(
    model: HiddenStateGPTModel, token_ids: Sequence[int], layout: ParallelLayout
) -> Tensor | None:
    """Logits [T, padded vocabulary] of one sequence in fp32, on the last stage; None elsewhere.

    Collective over the model replica; an all-gather over the tensor-parallel group joins the
    vocabulary shards, so that a rank holds the whole: for checks only.
    """
    num_tokens, multiple = len(token_ids), token_multiple(model.config)
    padded = -(-num_tokens // multiple) * multiple
    tokens_BT = torch.zeros(1, padded, dtype=torch.long, device=layout.device)
    tokens_BT[0, :num_tokens] = torch.tensor(token_ids)
    positions_BT = torch.arange(padded, device=layout.device)[None]
    microbatch = Microbatch(tokens_BT, positions_BT, tokens_BT, positions_BT < num_tokens)
    hidden = forward_hidden(model, [microbatch])
    if not layout.is_last_stage:
        return None
    shard_NU = model.project(hidden[0]).detach().contiguous()
    shards = [torch.empty_like(shard_NU) for _ in range(layout.tp_size)]
    dist.all_gather(shards, shard_NU, group=layout.tp_group)
    return torch.cat(shards, dim=-1).float()
