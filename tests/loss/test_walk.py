"""The pass over hidden states holds one chunk at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.loss.cases import DEFAULTS
from trb_megatron.loss.fused import fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer


class OperationCounter(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products, self.largest = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_larger_than_a_chunk(name: str) -> None:
    num_tokens, num_rows, width = 64, 400, 4
    layers = [OutputLayer(torch.randn(num_tokens, width), torch.randn(num_rows, width))] * 2
    hidden_NH = layers[0].hidden_NH.requires_grad_()
    chunk, num_buffers = (8, 2) if LOSSES[name].needs_teacher else (16, 1)
    if LOSSES[name].on_support:
        chunk, num_buffers = 16, 1
    with OperationCounter() as counter:
        output = fused_loss(
            FusedLossSettings(
                loss=LOSSES[name],
                options=LossOptions(**DEFAULTS),
                workspace_bytes=int(1.5 * 4 * num_rows * chunk * num_buffers),
            ),
            OutputLayer(hidden_NH, layers[0].weight_UH),
            layers[1] if LOSSES[name].needs_teacher else None,
            sampled_ids=torch.zeros(num_tokens, dtype=torch.long),
            weight_grad_UH=torch.zeros(num_rows, width),
        )
        output.loss_sum.backward()
    assert counter.largest == num_rows * chunk
    if LOSSES[name].on_support:  # two projections, and no product with a [tokens, U] gradient
        assert counter.num_products == 2 * num_tokens / chunk
