"""Mathematics on a vocabulary shard: normalizers, gather, top-k.

Shapes: N rows (packed tokens), K ids of a row, R ranks of the group, V full vocabulary, U = V/R
this rank's shard: rank r of the group owns ids [r*U, (r+1)*U). `tp_group=None` means unsharded.

An id whose logit is -inf does not exist: it has no mass and is never in a top-k.

Every sum over the vocabulary is an all-gather of per-rank partials, added in rank order: all ranks
compute bit-identical numbers, and so they take the same decisions. Nothing here is differentiable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FLOAT32_MIN = torch.finfo(torch.float32).min
# Columns of which a search for the largest first looks at the maximum.
_SEGMENT = 64


def vocab_range(local_width: int, tp_group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return [start, stop), the global ids that this rank's shard of `local_width` columns owns."""
    start = 0 if tp_group is None else dist.get_rank(tp_group) * local_width
    return start, start + local_width


def vocab_size(local_width: int, tp_group: dist.ProcessGroup | None) -> int:
    """Return V, the columns of all shards together."""
    return local_width if tp_group is None else dist.get_world_size(tp_group) * local_width


def rows_per_block(logits_NU: Tensor) -> int:
    """Return how many rows to work on at a time, so that temporaries are small.

    On a CPU a block fits into the cache, on a GPU it keeps the device busy.
    """
    elements = 2**18 if logits_NU.device.type == "cpu" else 2**23
    return max(1, elements // logits_NU.shape[-1])


def row_blocks(logits_NU: Tensor) -> list[slice]:
    """Return the slices of all rows in blocks of `rows_per_block`; at least one."""
    size = rows_per_block(logits_NU)
    return [slice(start, start + size) for start in range(0, max(1, len(logits_NU)), size)]


def all_gather(partial: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """All-gather a tensor of the same shape on each rank of `tp_group`; [R, ...], replicated.

    A lone rank gets a view of its own tensor: gloo's call takes longer than a small model's layer.
    """
    if tp_group is None or tp_group.size() == 1:
        return partial[None]
    partial = partial.contiguous()
    parts = [torch.empty_like(partial) for _ in range(tp_group.size())]
    dist.all_gather(parts, partial, group=tp_group)
    return torch.stack(parts)


def row_dot(left_NU: Tensor, right_NU: Tensor, scratch_NU: Tensor) -> Tensor:
    """Return the sum over each row of left * right, [N]; `scratch_NU` is overwritten.

    A fresh tensor per product would cost more time than the product, in page faults.
    """
    return torch.mul(left_NU, right_NU, out=scratch_NU).sum(dim=-1)


def mask_invalid(
    logits_NU: Tensor, num_valid: int | None, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Upcast to fp32 and set the columns from `num_valid` on, counted over all shards, to -inf.

    No communication. The input is not changed, but returned itself when there is nothing to do.
    Raises ValueError unless 1 <= num_valid <= V.
    """
    logits_NU = logits_NU.float()
    if _num_valid_columns(logits_NU.shape[-1], num_valid, tp_group) == logits_NU.shape[-1]:
        return logits_NU
    masked_NU = logits_NU.clone()
    mask_invalid_(masked_NU, num_valid, tp_group)
    return masked_NU


def mask_invalid_(
    logits_NU: Tensor, num_valid: int | None, tp_group: dist.ProcessGroup | None
) -> None:
    """`mask_invalid` in place, in the type of the logits."""
    logits_NU[:, _num_valid_columns(logits_NU.shape[-1], num_valid, tp_group) :] = -torch.inf


def _num_valid_columns(
    local_width: int, num_valid: int | None, tp_group: dist.ProcessGroup | None
) -> int:
    """How many columns of this shard are among the first `num_valid` of all shards."""
    if num_valid is None:
        return local_width
    if not 1 <= num_valid <= vocab_size(local_width, tp_group):
        raise ValueError(f"num_valid={num_valid} is outside the vocabulary of the shards")
    start, _ = vocab_range(local_width, tp_group)
    return min(max(num_valid - start, 0), local_width)


@dataclass(frozen=True)
class Softmax:
    """A softmax over a sharded vocabulary: this shard's logits and the normalizer of each row."""

    logits_NU: Tensor
    """[N, U] fp32, -inf where an id does not exist."""
    max_N: Tensor
    """[N] float64, largest logit over all shards."""
    log_sum_N: Tensor
    """[N] float64, log of the sum over all shards of exp(logit - max)."""

    def logprobs(
        self, rows: Tensor | slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return the normalized log-probabilities of this shard, of all rows or some, [N, U]."""
        max_N1, log_sum_N1 = self.max_N[rows, None], self.log_sum_N[rows, None]
        return (self.logits_NU[rows].to(dtype) - max_N1.to(dtype)).sub_(log_sum_N1.to(dtype))

    def normalize(self, logits_N: Tensor) -> Tensor:
        """Return the log-probabilities, [N] fp32, of one logit per row."""
        return logits_N - self.max_N.float() - self.log_sum_N.float()

    def problems(self, name: str) -> dict[str, Tensor]:
        """Messages for `raise_at_row` about unusable logits, and the rows, [N] bool."""
        return {
            f"{name} logits hold a NaN": self.max_N.isnan(),
            f"{name} logits hold a +inf": self.max_N == torch.inf,
            f"{name} logits hold no id: all are -inf": self.max_N == FLOAT32_MIN,
        }


@dataclass(frozen=True)
class ShardSoftmax:
    """One rank's share of a `Softmax`, before the gather."""

    shifted_NU: Tensor
    """[N, U] logits minus the shard's own maximum; finite: FLOAT32_MIN at ids that do not exist."""
    exp_NU: Tensor
    """[N, U] exp(shifted)."""
    partials_N2: Tensor
    """[N, 2] float64: the shard's maximum and sum of exp."""


def shard_softmax(logits_NU: Tensor) -> ShardSoftmax:
    """Return this shard's share of the softmax of fp32 logits; no communication."""
    # A finite stand-in keeps a shard without any existing id out of -inf - (-inf) = NaN.
    max_N = logits_NU.amax(dim=-1).clamp_min(FLOAT32_MIN)
    shifted_NU = (logits_NU - max_N[:, None]).clamp_min_(FLOAT32_MIN)
    exp_NU = shifted_NU.exp()
    partials_N2 = torch.stack((max_N, exp_NU.sum(dim=-1)), dim=-1)
    return ShardSoftmax(shifted_NU, exp_NU, partials_N2.double())


def combine_softmax(logits_NU: Tensor, partials_RN2: Tensor) -> Softmax:
    """Return the softmax of a shard's logits over all shards, from every rank's gathered partials.

    Ask the result for `problems` before using it.
    """
    max_RN, sum_RN = partials_RN2.unbind(dim=-1)
    max_N = max_RN.amax(dim=0)
    sum_N = ((max_RN - max_N).exp() * sum_RN).sum(dim=0)
    return Softmax(logits_NU, max_N, sum_N.log())


class RowError(ValueError):
    """Rows of logits that cannot be used: `problem` says why, `rows` counts from 0."""

    def __init__(self, problem: str, rows: Sequence[int]) -> None:
        super().__init__(f"{problem} in row {rows[0]}")
        self.problem, self.rows = problem, tuple(rows)


def raise_at_row(problems: dict[str, Tensor]) -> None:
    """Raise RowError with the first problem that a row has and all rows that have it.

    `problems` maps messages to booleans [N]. The host waits for the device once.
    """
    if torch.stack(tuple(problems.values())).any():
        for problem, bad_N in problems.items():
            if bad_N.any():
                raise RowError(problem, bad_N.nonzero()[:, 0].tolist())


def softmax(logits_NU: Tensor, *, tp_group: dist.ProcessGroup | None, name: str = "the") -> Softmax:
    """Normalize sharded logits, after an upcast to fp32.

    One all-gather over `tp_group`; logits sharded, normalizers replicated. Raises RowError, on all
    ranks alike, for a row that holds a NaN, a +inf or no existing id at all; `name` says whose.
    """
    logits_NU = logits_NU.float()
    partials_N2 = torch.cat(
        [shard_softmax(logits_NU[rows]).partials_N2 for rows in row_blocks(logits_NU)]
    )
    normalized = combine_softmax(logits_NU, all_gather(partials_N2, tp_group))
    raise_at_row(normalized.problems(name))
    return normalized


def gather_at(values_NU: Tensor, ids: Tensor, *, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return each row's values at global `ids` ([N] or [N, K]), in the shape of `ids`.

    One all-gather over `tp_group`; values sharded, ids and result replicated.
    """
    return gather_each_at((values_NU,), ids, tp_group=tp_group)[0]


def gather_each_at(
    tensors_NU: Sequence[Tensor], ids: Tensor, *, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, ...]:
    """Return what `gather_at` returns for each of several tensors, in one all-gather."""
    width = tensors_NU[0].shape[-1]
    start, _ = vocab_range(width, tp_group)
    ids_NK = ids.reshape(len(ids), -1)
    local_NK = (ids_NK - start).clamp(0, width - 1)
    values_RINK = all_gather(torch.stack([x.gather(-1, local_NK) for x in tensors_NU]), tp_group)
    owner_INK = (ids_NK // width).expand_as(values_RINK[0])
    return values_RINK.gather(0, owner_INK[None])[0].reshape(-1, *ids.shape).unbind(dim=0)


def topk(logits_NU: Tensor, k: int, *, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row and their ids, both [N, K], largest first.

    Ties go to the lowest id. One all-gather over `tp_group` of min(k, U) candidates per rank;
    logits sharded, results replicated (values in float64, which holds every input exactly).
    Raises ValueError, on all ranks alike, when k < 1 or a row has fewer than k ids.
    """
    if not 1 <= k <= vocab_size(logits_NU.shape[-1], tp_group):
        raise ValueError(f"top_k={k} must be at least 1 and at most the number of valid ids")
    start, _ = vocab_range(logits_NU.shape[-1], tp_group)
    values_NK, ids_NK = _segmented_topk(logits_NU, min(k, logits_NU.shape[-1]))
    candidates_RNK2 = all_gather(
        torch.stack((values_NK.double(), (ids_NK + start).double()), dim=-1), tp_group
    )
    # In rank order ids ascend, so a stable sort by value leaves ties at the lowest id.
    candidates_NK2 = candidates_RNK2.transpose(0, 1).flatten(1, 2)
    values_NK, order_NK = candidates_NK2[..., 0].sort(dim=-1, descending=True, stable=True)
    values_NK, order_NK = values_NK[:, :k], order_NK[:, :k]
    raise_at_row({f"top_k={k} exceeds the number of valid ids": values_NK[:, -1] == -torch.inf})
    return values_NK, candidates_NK2[..., 1].gather(-1, order_NK).long()


def _segmented_topk(logits_NU: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_local_topk` that looks for the k largest only in the k segments of the largest maxima.

    Exact: an id outside of them has k ids before it, those of the segments' maxima (of equal
    segments, too, the lowest are taken).
    """
    num_segments = logits_NU.shape[-1] // _SEGMENT
    if num_segments <= 2 * k:
        return _local_topk(logits_NU, k)
    rest = num_segments * _SEGMENT
    segments_NSJ = logits_NU[:, :rest].unflatten(-1, (num_segments, _SEGMENT))
    chosen_NK = _local_topk(segments_NSJ.amax(dim=-1), k)[1].sort(dim=-1).values
    columns_NKJ = chosen_NK[..., None] * _SEGMENT + torch.arange(_SEGMENT, device=chosen_NK.device)
    rest_ids = torch.arange(rest, logits_NU.shape[-1], device=chosen_NK.device)
    ids_NC = torch.cat((columns_NKJ.flatten(1), rest_ids.expand(len(logits_NU), -1)), dim=-1)
    values_NK, indices_NK = _local_topk(logits_NU.gather(-1, ids_NC), k)
    return values_NK, ids_NC.gather(-1, indices_NK)


def _local_topk(logits_NU: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k with ties to the lowest id; equal values come in ascending order of id."""
    values_NK, ids_NK = logits_NU.topk(k, dim=-1)
    threshold_N1 = values_NK[:, -1:]
    # torch.topk breaks ties as it likes. That matters where the k-th value also occurs outside.
    num_outside_N = (logits_NU >= threshold_N1).sum(dim=-1) - k
    (tied_M,) = (num_outside_N > 0).nonzero(as_tuple=True)
    if len(tied_M) > 0:
        logits_MU = logits_NU[tied_M]
        above_MU = logits_MU > threshold_N1[tied_M]
        equal_MU = logits_MU == threshold_N1[tied_M]
        num_wanted_M1 = k - above_MU.sum(dim=-1, keepdim=True)
        chosen_MU = above_MU | (equal_MU & (equal_MU.cumsum(dim=-1) <= num_wanted_M1))
        ids_NK[tied_M] = chosen_MU.nonzero()[:, 1].view(-1, k)
    ids_NK = ids_NK.sort(dim=-1).values
    values_NK, order_NK = logits_NU.gather(-1, ids_NK).sort(dim=-1, descending=True, stable=True)
    return values_NK, ids_NK.gather(-1, order_NK)
