"""The student's single-token step as CUDA graphs.

Decoding one token launches hundreds of small kernels, and a GPU outruns the Python that launches
them. A CUDA graph replays the launches of a recorded step at once. It reads fixed addresses, so
the inputs are copied into buffers and the number of sequences is padded to one of a few sizes, each
with a graph of its own that is recorded when it is first needed.

Shapes: S sequences, P pages of the longest possible sequence, U this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trb_megatron.models.forward import CachedModel
from trb_megatron.models.kv_cache import SCRATCH_PAGE, RaggedBatch


def record_cuda_graph(
    step: Callable[[], tuple[Tensor, ...]],
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record a step, which must not read anything back to the host, as a CUDA graph.

    Returns what repeats the step, and the tensors that hold its results each time.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # lets libraries allocate their workspaces, which a recording must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class DecodeGraphs:
    """Runs one token of each of S sequences by replaying recorded steps.

    For a model without pipeline stages. The graphs hold the addresses of the model's weights and
    cache: optimizers that update in place are fine, another cache needs another object.

    Args:
        finish: what follows the logits [S, U], given them and the keys of their positions [S];
            tensors of S rows each.
        max_pages: pages of the longest sequence.
    """

    def __init__(
        self,
        model: CachedModel,
        finish: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        max_pages: int,
        page_tokens: int,
        token_multiple: int,
    ) -> None:
        self._model = model
        self._finish = finish
        self._max_pages = max_pages
        self._page_tokens = page_tokens
        self._token_multiple = token_multiple
        self._steps: dict[int, _Step] = {}

    def __call__(
        self, past_S: Tensor, tokens_S: Tensor, key_S: Tensor, block_table_SP: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits [S, U] behind `tokens_S`, each the token number `past_S` of its sequence, and
        what `finish` makes of them."""
        size = _padded_size(len(tokens_S))
        if size not in self._steps:
            self._steps[size] = self._recorded(size, tokens_S.device)
        return self._steps[size](past_S, tokens_S, key_S, block_table_SP)

    def _recorded(self, size: int, device: torch.device) -> _Step:
        past_S = torch.zeros(size, dtype=torch.long, device=device)
        tokens_S, key_S = torch.zeros_like(past_S), torch.zeros_like(past_S)
        block_table_SP = torch.full((size, self._max_pages), SCRATCH_PAGE, device=device)

        def step() -> tuple[Tensor, ...]:
            batch = RaggedBatch.uniform(
                past_S, 1, block_table_SP, self._page_tokens, self._token_multiple
            )
            hidden_SH = self._model.forward(batch, tokens_S)
            assert hidden_SH is not None, "graphs are for models without pipeline stages"
            logits_SU = self._model.project(hidden_SH)
            return logits_SU, *self._finish(logits_SU, key_S)

        return _Step((past_S, tokens_S, key_S), block_table_SP, *record_cuda_graph(step))


class _Step:
    """A recorded step with its input buffers; rows beyond S use the scratch page.

    Args:
        inputs: of S rows each: numbers of tokens, tokens, keys.
        results: of S rows each.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        block_table_SP: Tensor,
        replay: Callable[[], None],
        results: tuple[Tensor, ...],
    ) -> None:
        self._inputs, self._block_table_SP = inputs, block_table_SP
        self._replay, self._results = replay, results

    def __call__(
        self, past_S: Tensor, tokens_S: Tensor, key_S: Tensor, block_table_SP: Tensor
    ) -> tuple[Tensor, ...]:
        num_sequences, num_pages = block_table_SP.shape
        for buffer_S, values_S in zip(self._inputs, (past_S, tokens_S, key_S), strict=True):
            buffer_S[:num_sequences] = values_S
        self._inputs[0][num_sequences:] = 0
        self._block_table_SP[:num_sequences, :num_pages] = block_table_SP
        self._block_table_SP[num_sequences:] = SCRATCH_PAGE
        self._replay()
        return tuple(result[:num_sequences].clone() for result in self._results)


def _padded_size(num_sequences: int) -> int:
    """The next power of two up to 64, then the next multiple of 64."""
    if num_sequences > 64:
        return -(-num_sequences // 64) * 64
    return 1 << (num_sequences - 1).bit_length()
