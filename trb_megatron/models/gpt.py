"""Megatron's GPT model, split where this project needs it: hidden states, then the output layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from trb_megatron.models import fp8
from trb_megatron.models.kv_cache import head_shape, kv_bytes_per_token


class HiddenStateGPTModel(GPTModel):
    """A GPT model whose forward ends at the final hidden states; `project` makes the logits.

    Keeping the two apart lets a loss walk the vocabulary projection in pieces, so that no
    [tokens, vocabulary] tensor of a whole batch exists.

    Attributes:
        token_multiple: the number of tokens of a forward pass must be a multiple of it.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.token_multiple = self.num_sequence_shards * (fp8.MULTIPLE if config.fp8 else 1)

    @property
    def num_sequence_shards(self) -> int:
        """Ranks that the tokens between the layers are cut over, for sequence parallelism."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1

    @property
    def fp8_copy_bytes(self) -> int:
        """Memory of the FP8 copies of the layers' weights, which the first pass makes."""
        if self.config.fp8 is None:
            return 0
        copied = (param.numel() for param in self.decoder.parameters() if param.dim() > 1)
        return fp8.INFERENCE_COPY_BYTES * sum(copied)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of this rank's layers."""
        itemsize = self.config.params_dtype.itemsize
        return kv_bytes_per_token(len(self.decoder.layers), *head_shape(self.config), itemsize)

    @contextmanager
    def in_inference(self) -> Iterator[None]:
        """Evaluation mode, with the weights as they are now; for passes with a cache.

        Transformer Engine keeps FP8 copies of the weights until it is told to renew them, which
        Megatron's schedules do. With delayed scaling the products are bf16 (see `fp8`).
        """
        was_training, fp8_format = self.training, self.config.fp8
        self.eval()
        self.set_is_first_microbatch()
        if self.config.fp8_recipe == "delayed":
            self.config.fp8 = None
        try:
            yield
        finally:
            self.train(was_training)
            self.config.fp8 = fp8_format

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's description of the parameters for a checkpoint, the same for any precision.

        Without Transformer Engine's extra states. They are pickled Python objects, empty but for
        delayed scaling, whose histories begin anew in a resumed run.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "_extra_state" not in name}

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def embed(self, tokens_1N: Tensor) -> Tensor | None:
        """Embeddings [N, 1, H] by a mere lookup where that is all; None leaves them to Megatron.

        Without tensor parallelism Megatron's two autograd functions around the lookup do nothing
        but take time.
        """
        if not self.pre_process or self.config.tensor_model_parallel_size > 1:
            return None
        return F.embedding(tokens_1N.T, self.embedding.word_embeddings.weight)

    def gather_hidden(self, hidden: Tensor) -> Tensor:
        """[T, B, H] of the whole sequence from the last stage's output.

        With sequence parallelism an all-gather over the tensor-parallel group of [T/tp, B, H]; its
        backward takes this rank's part, since the fused loss (or `project`) has summed the gradient
        already.
        """
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )

    @property
    def output_weight(self) -> Any:
        """This rank's rows [U, H] of the output weight, tied or not; on the last stage.

        A parameter on which Megatron's data parallelism hangs a gradient buffer, `main_grad`.
        """
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def project(self, hidden: Tensor) -> Tensor:
        """Vocabulary-parallel logits [..., U] of gathered hidden states [..., H], in their type.

        Differentiable: the gradient of the replicated `hidden` is all-reduced over the
        tensor-parallel group, that of the weight shard is local.
        """
        if not torch.is_grad_enabled():
            return F.linear(hidden, self.output_weight)
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            self.output_weight,
            None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def common_token_multiple(models: Iterable[HiddenStateGPTModel | None]) -> int:
    """The least common multiple of the models' `token_multiple`."""
    return math.lcm(*(model.token_multiple for model in models if model is not None))
