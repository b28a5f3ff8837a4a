"""A model at N prefixes as the losses read it, and the metrics that need no loss.

Shapes: N rows (packed tokens), K ids of the student's top-k, R ranks of the tensor-parallel group,
U this rank's vocabulary shard. An id that is -inf does not exist.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.distributed.vocab_parallel import (
    ShardSoftmax,
    Softmax,
    all_gather,
    combine_softmax,
    gather_at,
    raise_at_row,
    row_dot,
    shard_softmax,
    topk,
)


class Summary(NamedTuple):
    """The part of a model's logits at N prefixes that is kept; all replicated over shards."""

    topk_ids_NK: Tensor
    """The model's own top-k ids, largest first, ties to the lowest id."""
    support_NK: Tensor
    """Log-probabilities of the student's top-k ids, float64."""
    entropy_N: Tensor
    """Nats, float64."""


@dataclass(frozen=True)
class ModelView:
    """A model at N prefixes: this shard's logits, divided by the temperature, and their softmax."""

    shard: ShardSoftmax
    softmax: Softmax
    summary: Summary
    tp_group: dist.ProcessGroup | None

    def logprobs_at(self, ids: Tensor) -> Tensor:
        """Log-probabilities of each row's `ids` ([N] or [N, K]) in float64; one all-gather."""
        logits = gather_at(self.softmax.logits_NU, ids, tp_group=self.tp_group)
        return _normalize(logits, self.softmax)

    def log_scale_N(self) -> Tensor:
        """The number that makes `shard.shifted_NU` log-probabilities when it is added, float64."""
        return self.shard.partials_N2[:, 0] - self.softmax.max_N - self.softmax.log_sum_N

    def probs_NU(self) -> Tensor:
        """This shard's probabilities, a new tensor."""
        return self.shard.exp_NU * self.log_scale_N().exp().float()[:, None]


def view_model(
    name: str,
    logits_NU: Tensor,
    top_k: int,
    tp_group: dist.ProcessGroup | None,
    support_ids_NK: Tensor | None = None,
) -> ModelView:
    """Normalize fp32 logits over all shards and summarize them.

    `support_ids_NK` are the student's top-k ids, None if this is the student. Two all-gathers over
    `tp_group`, a third for given ids; logits sharded, ids and summary replicated. Raises
    ValueError, on all ranks alike, with `name` and the row of a NaN or a +inf, and for a `top_k`
    beyond the number of existing ids.
    """
    shard = shard_softmax(logits_NU)
    # A third partial, of the entropy, travels with the two of the softmax.
    weighted_N1 = row_dot(shard.exp_NU, shard.shifted_NU, torch.empty_like(shard.exp_NU))[:, None]
    partials_RN3 = all_gather(torch.cat((shard.partials_N2, weighted_N1.double()), -1), tp_group)
    softmax = combine_softmax(logits_NU, partials_RN3[..., :2])
    raise_at_row(softmax.problems(name))
    support_logits_NK, topk_ids_NK = topk(logits_NU, top_k, tp_group=tp_group)
    if support_ids_NK is not None:
        support_logits_NK = gather_at(logits_NU, support_ids_NK, tp_group=tp_group)
    entropy_N = _combine_entropy(softmax, partials_RN3)
    summary = Summary(topk_ids_NK, _normalize(support_logits_NK, softmax), entropy_N)
    return ModelView(shard, softmax, summary, tp_group)


def _combine_entropy(softmax: Softmax, partials_RN3: Tensor) -> Tensor:
    """Entropy [N] float64 in nats, from each shard's maximum, sum of exp, and sum of exp * shifted
    (shifted = logit - maximum)."""
    max_RN, sum_RN, weighted_RN = partials_RN3.unbind(dim=-1)
    offset_RN = max_RN - softmax.max_N
    scale_RN = offset_RN.exp()
    sum_N = (scale_RN * sum_RN).sum(dim=0)
    weighted_N = (scale_RN * (weighted_RN + sum_RN * offset_RN)).sum(dim=0)
    return softmax.log_sum_N - weighted_N / sum_N


def _normalize(logits: Tensor, softmax: Softmax) -> Tensor:
    """Log-probabilities of some logits of each row, [N] or [N, K], in float64."""
    log_normalizer_N = softmax.max_N + softmax.log_sum_N
    return logits.double() - log_normalizer_N.view(-1, *[1] * (logits.dim() - 1))


def compute_metrics(student: Summary, teacher: Summary | None) -> dict[str, Tensor]:
    """Describe N prefixes, each metric [N] fp32; those of the teacher where there is one.

    - `student_topk_mass`, `teacher_topk_mass`: p and q of S. A truncated KL says nothing about the
      mass outside.
    - `student_entropy`, `teacher_entropy`: over the whole vocabulary, in nats.
    - `topk_overlap`: the share |S & T| / k of the student's top-k ids that are also among the
      teacher's own top-k ids T. (Other definitions in use: |S & T| / |S | T|, and the mass that
      either model has on S & T.)
    """
    metrics = {
        "student_topk_mass": student.support_NK.exp().sum(dim=-1).float(),
        "student_entropy": student.entropy_N.float(),
    }
    if teacher is not None:
        is_shared_NK = (student.topk_ids_NK[..., None] == teacher.topk_ids_NK[:, None]).any(dim=-1)
        metrics |= {
            "teacher_topk_mass": teacher.support_NK.exp().sum(dim=-1).float(),
            "teacher_entropy": teacher.entropy_N.float(),
            "topk_overlap": is_shared_NK.float().mean(dim=-1),
        }
    return metrics
