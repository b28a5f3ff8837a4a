"""Sampling an id of a sharded vocabulary: Gumbel-max on two levels, with keyed noise.

The argmax of log p + Gumbel noise follows p (Maddison, Tarlow and Minka, arXiv 1411.0030). It is
the argmax of p / E with E exponential, -log E being the Gumbel noise: the same order without a
logarithm of p. First a chunk of CHUNK_WIDTH ids is drawn by its mass, then an id in it,
each with noise of its own. So about 2 sqrt(V) numbers a row are enough, where one level takes V.

Rounding of logits moves an id with a probability of at most twice the total variation that it
makes, at each level (a coupling without communication: Daliri, Musco and Suresh, arXiv 2408.07978).
An inverse CDF over ids would move each of V boundaries.

Shapes: N rows, U this rank's vocabulary shard, C chunks that it has columns of, W columns of a
chunk, R ranks of the group. Chunks are counted over the whole vocabulary, so that they are the same
at any R; shard boundaries may cut them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.distributed.vocab_parallel import (
    FLOAT32_MIN,
    all_gather,
    raise_at_row,
    row_blocks,
    shard_softmax,
    vocab_range,
)
from trb_megatron.uniforms import Level, Purpose, exponential_noise

CHUNK_WIDTH = 256
RULE = f"Gumbel-max over chunks of {CHUNK_WIDTH} ids"
"""The name of what turns random numbers into tokens: other rules give a run other tokens."""


class Sample(NamedTuple):
    """An id of each row, and its log-probability; both [N] and replicated."""

    token_ids: Tensor
    """int64."""
    logprobs: Tensor
    """fp32; not finite for a row that holds a NaN, a +inf or no id at all."""


def sample_softmax(
    logits_NU: Tensor, key_N: Tensor, purpose: Purpose, *, tp_group: dist.ProcessGroup | None
) -> Sample:
    """Sample each row's softmax.

    The host never waits for the device: logits that cannot be used show in the log-probabilities.
    Two all-gathers over `tp_group` (the best chunk of each rank, then its best id); fp32 logits
    sharded, keys (`uniforms.position_keys`) and result replicated; masses in float64.
    """
    shard = _Shard(logits_NU.shape[-1], tp_group)
    # A finite stand-in keeps a shard without any existing id out of -inf - (-inf) = NaN.
    max_N = logits_NU.amax(dim=-1).clamp_min(FLOAT32_MIN)
    mass_NC = torch.cat(
        [
            shard.chunk_sums((logits_NU[rows] - max_N[rows, None]).exp_())
            for rows in row_blocks(logits_NU)
        ]
    )
    chunk = _draw_chunk(mass_NC, max_N.double(), key_N, purpose, shard)
    ids_NW = shard.chunk_ids(chunk.number_N)
    logits_NW = shard.columns(logits_NU, ids_NW, absent=-torch.inf)
    weights_NW = (logits_NW - max_N[:, None]).exp_()
    ids_N, logits_N = _draw_id(ids_NW, weights_NW, logits_NW, chunk, key_N, purpose, shard)
    return Sample(ids_N, (logits_N - chunk.base_N - chunk.mass_N.log()).float())


def most_likely(logits_NU: Tensor, *, tp_group: dist.ProcessGroup | None) -> Sample:
    """Take each row's largest logit, ties to the lowest id.

    The host never waits for the device. One all-gather over `tp_group`; fp32 logits sharded, result
    replicated.
    """
    start, _ = vocab_range(logits_NU.shape[-1], tp_group)
    blocks = [logits_NU[rows] for rows in row_blocks(logits_NU)]
    partials_N2 = torch.cat([shard_softmax(block).partials_N2 for block in blocks])
    best_N = logits_NU.argmax(dim=-1) + start
    parts_RN3 = all_gather(torch.cat((partials_N2, best_N[:, None].double()), dim=-1), tp_group)
    max_RN, sum_RN, best_RN = parts_RN3.unbind(dim=-1)
    owner_1N = max_RN.argmax(dim=0, keepdim=True)
    max_1N = max_RN.gather(0, owner_1N)
    mass_N = ((max_RN - max_1N).exp() * sum_RN).sum(dim=0)
    return Sample(best_RN.gather(0, owner_1N)[0].long(), -mass_N.log().float())


def sample_weights(
    weights_NU: Tensor, key_N: Tensor, purpose: Purpose, *, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Sample each row's weights, which are nonnegative and need not be normalized, [N] int64.

    An id of weight zero is never returned. Two all-gathers over `tp_group`; weights sharded, keys
    and result replicated; sums in float64. Raises RowError, on all ranks alike, for a row whose
    total is not positive and finite; for that the host waits for the device, once.
    """
    shard = _Shard(weights_NU.shape[-1], tp_group)
    mass_NC = shard.chunk_sums(weights_NU)
    chunk = _draw_chunk(mass_NC, torch.zeros_like(mass_NC[:, 0]), key_N, purpose, shard)
    is_usable_N = (chunk.mass_N > 0) & (chunk.mass_N < torch.inf)
    raise_at_row({"sampling weights have no finite sum": ~is_usable_N})
    ids_NW = shard.chunk_ids(chunk.number_N)
    weights_NW = shard.columns(weights_NU, ids_NW, absent=0.0)
    return _draw_id(ids_NW, weights_NW, weights_NW, chunk, key_N, purpose, shard)[0]


@dataclass(frozen=True)
class _Shard:
    """The chunks of this rank's columns."""

    width: int
    tp_group: dist.ProcessGroup | None

    @property
    def start(self) -> int:
        return vocab_range(self.width, self.tp_group)[0]

    @property
    def first_chunk(self) -> int:
        return self.start // CHUNK_WIDTH

    @property
    def starts(self) -> range:
        """The first id of every rank's shard."""
        num_ranks = 1 if self.tp_group is None else self.tp_group.size()
        return range(0, num_ranks * self.width, self.width)

    @property
    def is_whole(self) -> bool:
        """Whether there is no other shard; then a small model saves the time to hear of others."""
        return len(self.starts) == 1

    def chunk_sums(self, weights_NU: Tensor) -> Tensor:
        """The mass of this shard's part of each chunk that it has columns of, [N, C] float64."""
        head = min(-self.start % CHUNK_WIDTH, self.width)
        tail = self.width - (self.width - head) % CHUNK_WIDTH
        parts = (
            weights_NU[:, None, :head],
            weights_NU[:, head:tail].unflatten(-1, (-1, CHUNK_WIDTH)),
            weights_NU[:, None, tail:],
        )
        sums = [x.sum(dim=-1, dtype=torch.float64) for x in parts if x.shape[1:].numel() > 0]
        return torch.cat(sums, dim=-1)

    def split(self, mass_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The masses of chunks that lie between this shard's boundaries, [N, C] with 0 elsewhere;
        that of the columns which belong to a chunk of a shard before, and that of the last chunk
        that begins here, which may go on in the shards behind, [N]."""
        num_heads = int(self.start % CHUNK_WIDTH != 0)
        last = mass_NC.shape[-1] - 1
        inner_NC, zeros_N = mass_NC.clone(), torch.zeros_like(mass_NC[:, 0])
        inner_NC[:, :num_heads] = 0
        inner_NC[:, last:] = 0
        return (
            inner_NC,
            mass_NC[:, 0] if num_heads == 1 else zeros_N,
            mass_NC[:, last] if last >= num_heads else zeros_N,
        )

    def chunk_ids(self, chunk_N: Tensor) -> Tensor:
        """The ids of one chunk for each row, [N, W]; some may be beyond the vocabulary."""
        offsets = torch.arange(CHUNK_WIDTH, device=chunk_N.device)
        return chunk_N[:, None] * CHUNK_WIDTH + offsets

    def columns(self, values_NU: Tensor, ids_NW: Tensor, absent: float) -> Tensor:
        """The values at ids of each row, [N, W], `absent` where another shard has them or none."""
        column_NW = ids_NW - self.start
        mine_NW = column_NW.clamp(0, self.width - 1)
        return values_NU.gather(-1, mine_NW).masked_fill_(mine_NW != column_NW, absent)


class _Chunk(NamedTuple):
    """The chunk that was drawn for each row, and the masses that it was drawn by."""

    number_N: Tensor
    scale_N: Tensor
    """The unit of this shard's weights in that of all shards."""
    base_N: Tensor
    """The largest base of all shards; masses are in units of its exponential."""
    mass_N: Tensor
    """Of all chunks together."""


def _draw_chunk(
    mass_NC: Tensor, base_N: Tensor, key_N: Tensor, purpose: Purpose, shard: _Shard
) -> _Chunk:
    """Draw a chunk by its mass; masses in units of exp(base), each rank's own; float64.

    One all-gather, besides a shard that is whole: base and mass of each rank, its best chunk among
    those that no boundary can cut, and its parts of the others.
    """
    numbers_C = torch.arange(mass_NC.shape[-1], device=key_N.device) + shard.first_chunk
    noise_NC = exponential_noise(key_N, purpose, Level.CHUNK, numbers_C[None])
    total_N = mass_NC.sum(dim=-1)
    if shard.is_whole:
        number_N = numbers_C[(mass_NC / noise_NC).argmax(dim=-1)]
        return _Chunk(number_N, torch.ones_like(base_N), base_N, total_N)
    inner_NC, head_N, tail_N = shard.split(mass_NC)
    score_NC = inner_NC / noise_NC
    best_N1 = score_NC.argmax(dim=-1, keepdim=True)
    score_N, number_N = score_NC.gather(-1, best_N1)[:, 0], numbers_C[best_N1[:, 0]]
    parts_6N = torch.stack((base_N, total_N, score_N, number_N.double(), head_N, tail_N))
    base_RN, total_RN, score_RN, number_RN, head_RN, tail_RN = all_gather(
        parts_6N, shard.tp_group
    ).unbind(dim=1)
    top_N = base_RN.amax(dim=0)
    scale_RN = (base_RN - top_N).exp()
    last_RN, last_number_R = _score_last_chunks(
        scale_RN * head_RN, scale_RN * tail_RN, key_N, purpose, shard
    )
    # In the order of chunks, so that ties go to the lowest.
    both_RN = torch.stack((scale_RN * score_RN, last_RN), dim=1).flatten(0, 1)
    last_number_RN = last_number_R[:, None].expand_as(number_RN).double()
    numbers_RN = torch.stack((number_RN, last_number_RN), dim=1).flatten(0, 1)
    best_1N = both_RN.argmax(dim=0, keepdim=True)
    return _Chunk(
        numbers_RN.gather(0, best_1N)[0].long(),
        (base_N - top_N).exp(),
        top_N,
        (scale_RN * total_RN).sum(dim=0),
    )


def _score_last_chunks(
    head_RN: Tensor, tail_RN: Tensor, key_N: Tensor, purpose: Purpose, shard: _Shard
) -> tuple[Tensor, Tensor]:
    """Scores [R, N] and numbers [R] of the last chunk that begins in each shard.

    Args:
        head_RN: mass of each rank's columns that belong to a chunk of a shard before.
        tail_RN: mass of each rank's columns of the last chunk that begins in it.
    """
    mass_RN = tail_RN.clone()
    for rank, start in enumerate(shard.starts):
        origin = start // CHUNK_WIDTH * CHUNK_WIDTH // shard.width
        if origin < rank:
            mass_RN[origin] += head_RN[rank]
    stop_R = shard.width * torch.arange(1, 1 + len(shard.starts), device=key_N.device)
    number_R = (stop_R - 1) // CHUNK_WIDTH
    noise_NR = exponential_noise(key_N, purpose, Level.CHUNK, number_R[None])
    return mass_RN / noise_NR.T, number_R


def _draw_id(
    ids_NW: Tensor,
    weights_NW: Tensor,
    values_NW: Tensor,
    chunk: _Chunk,
    key_N: Tensor,
    purpose: Purpose,
    shard: _Shard,
) -> tuple[Tensor, Tensor]:
    """Draw an id of the chunk by its weights; ids and their values (float64), [N].

    One all-gather, besides a shard that is whole: the best of each rank. Every rank looks at its
    part of the chunk, if only to find nothing: that is cheaper than to know which rows are here.
    """
    score_NW = weights_NW / exponential_noise(key_N, purpose, Level.ID, ids_NW)
    best_N1 = score_NW.argmax(dim=-1, keepdim=True)
    ids_N, values_N = ids_NW.gather(-1, best_N1)[:, 0], values_NW.gather(-1, best_N1)[:, 0]
    # Logits that cannot be used must not lead beyond the vocabulary.
    ids_N = ids_N.clamp_max_(shard.starts.stop - 1)
    if shard.is_whole:
        return ids_N, values_N.double()
    score_N = score_NW.gather(-1, best_N1)[:, 0] * chunk.scale_N
    parts_3N = torch.stack((score_N, ids_N.double(), values_N.double()))
    score_RN, ids_RN, values_RN = all_gather(parts_3N, shard.tp_group).unbind(dim=1)
    owner_1N = score_RN.argmax(dim=0, keepdim=True)
    return ids_RN.gather(0, owner_1N)[0].long(), values_RN.gather(0, owner_1N)[0]
