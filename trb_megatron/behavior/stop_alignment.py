"""Stopping as one event: the end-of-sequence ids of student and teacher merged into one id.

Base students and chat teachers often stop with different tokens. Blending, sampling and losses then
compare distributions in which all of a model's stop ids are one.

Shapes: N rows (prefixes), K ids of a row, U this rank's vocabulary shard.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.distributed.vocab_parallel import gather_at, vocab_range, vocab_size


@dataclass(frozen=True)
class StopAlignment:
    """The end-of-sequence ids of both models, in the order of their generation configs.

    Raises ValueError when a model has none.
    """

    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, ids in (("student", self.student_ids), ("teacher", self.teacher_ids)):
            if not ids:
                raise ValueError(f"the {name} has no end-of-sequence id")

    @property
    def stop_id(self) -> int:
        """The one id that stands for stopping: the student's first."""
        return self.student_ids[0]

    @property
    def removed_ids(self) -> tuple[int, ...]:
        """The ids that no longer exist after the merge, ascending."""
        return tuple(sorted({*self.student_ids, *self.teacher_ids} - {self.stop_id}))

    @property
    def is_trivial(self) -> bool:
        """Whether both models stop with the same single id, so that there is nothing to merge."""
        return not self.removed_ids


def align_stop_ids(
    logits_NU: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Make stopping one id: a model's own stop ids merge into `alignment.stop_id`.

    Column stop_id becomes the logsumexp over `own_ids` (this model's stop ids) and the removed ids
    become -inf. Divide by the temperature before. Returns `logits_NU` itself when trivial.

    One all-gather over `tp_group`; logits and result sharded, [N, U], dtype kept; not
    differentiable (the loss merges with `merge_stop_ids_` and spreads the gradient itself). Raises
    ValueError for an id beyond the vocabulary.
    """
    if alignment.is_trivial:
        return logits_NU
    merged_NU = logits_NU.clone()
    merge_stop_ids_(merged_NU, own_ids, alignment, tp_group=tp_group)
    return merged_NU


def merge_stop_ids_(
    logits_NU: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """`align_stop_ids` in place and outside of autograd.

    Returns the shares [N, K] fp32 of the merged logit's gradient that go to the distinct
    `own_ids`. One all-gather over `tp_group`; logits sharded, shares replicated.
    """
    num_columns = vocab_size(logits_NU.shape[-1], tp_group)
    for stop_id in (*own_ids, alignment.stop_id, *alignment.removed_ids):
        if not 0 <= stop_id < num_columns:
            raise ValueError(f"end-of-sequence id {stop_id} is beyond the vocabulary")
    ids_K = torch.tensor(_distinct(own_ids), device=logits_NU.device)
    ids_NK = ids_K.expand(len(logits_NU), -1)
    own_NK = gather_at(logits_NU, ids_NK, tp_group=tp_group).float()
    start, stop = vocab_range(logits_NU.shape[-1], tp_group)
    logits_NU[:, _columns(alignment.removed_ids, start, stop)] = -torch.inf
    if start <= alignment.stop_id < stop:
        logits_NU[:, alignment.stop_id - start] = own_NK.logsumexp(dim=-1).to(logits_NU.dtype)
    return own_NK.softmax(dim=-1)


def spread_stop_gradient_(
    grad_NU: Tensor,
    shares_NK: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
    *,
    tp_group: dist.ProcessGroup | None,
) -> None:
    """Turn the gradient of merged logits into that of the logits before, in place.

    `shares_NK` are those that `merge_stop_ids_` returned. One all-gather over `tp_group`; gradient
    sharded, shares replicated.
    """
    stop_N = torch.full((len(grad_NU),), alignment.stop_id, device=grad_NU.device)
    merged_N1 = gather_at(grad_NU, stop_N, tp_group=tp_group)[:, None].float()
    own_NK = (merged_N1 * shares_NK).to(grad_NU.dtype)
    start, stop = vocab_range(grad_NU.shape[-1], tp_group)
    grad_NU[:, _columns((alignment.stop_id, *alignment.removed_ids), start, stop)] = 0
    own_ids = _distinct(own_ids)
    local = [k for k, own_id in enumerate(own_ids) if start <= own_id < stop]
    grad_NU[:, [own_ids[k] - start for k in local]] = own_NK[:, local]


def spread_stop_columns(
    ids_NK: Tensor,
    grad_NK: Tensor,
    shares_NJ: Tensor,
    own_ids: tuple[int, ...],
    alignment: StopAlignment,
) -> tuple[Tensor, Tensor]:
    """`spread_stop_gradient_` for a gradient of K columns per row, given by global ids.

    Returns ids and values [N, K + J] for J distinct `own_ids`. `ids_NK` name no removed id and none
    twice; the result may name one twice, whose values add up. No communication.
    """
    is_stop_NK = ids_NK == alignment.stop_id
    merged_N1 = torch.where(is_stop_NK, grad_NK, 0.0).sum(dim=-1, keepdim=True)
    own_NJ = torch.tensor(_distinct(own_ids), device=ids_NK.device).expand(len(ids_NK), -1)
    kept_NK = torch.where(is_stop_NK, 0.0, grad_NK)
    return torch.cat((ids_NK, own_NJ), -1), torch.cat((kept_NK, merged_N1 * shares_NJ), -1)


def _distinct(ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids in their order, each once."""
    return tuple(dict.fromkeys(ids))


def _columns(ids: tuple[int, ...], start: int, stop: int) -> list[int]:
    """The local columns of those `ids` that this shard owns."""
    return [i - start for i in ids if start <= i < stop]
