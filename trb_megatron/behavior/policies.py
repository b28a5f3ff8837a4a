"""Policies: the distributions that rollouts are sampled from, and how a token is drawn from each.

A policy sees the logits of N prefixes on this rank's vocabulary shard, and the key of each one's
random numbers. It knows nothing of caches, batches or draft lengths. A policy that asks the teacher
is a distribution mu here, no more: all of them draw by the same maximal coupling with the student's
proposal (`coupling.draw_tokens`), hence exactly and speculatively at any draft length.

p = student, q = teacher, both at the rollout temperature, over aligned stop events; mu = behavior
policy. Shapes: N prefixes, U this rank's vocabulary shard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.batch import TokenRecord
from trb_megatron.behavior.coupling import draw_tokens
from trb_megatron.behavior.sampling import Sample, most_likely, sample_softmax
from trb_megatron.behavior.solver import solve_behavior
from trb_megatron.behavior.stop_alignment import StopAlignment, align_stop_ids
from trb_megatron.distributed.vocab_parallel import (
    Softmax,
    all_gather,
    gather_each_at,
    mask_invalid,
    raise_at_row,
    softmax,
    topk,
    vocab_range,
)
from trb_megatron.uniforms import Purpose


class Policy(Protocol):
    """A distribution over the next token; its decisions are identical on all TP ranks.

    `key_N` keys the random numbers of each prefix (`uniforms.position_keys`).
    """

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def least_acceptance(self) -> float:
        """What the mean chance that a proposal is accepted cannot fall below, whatever the models.

        The choice of the draft length begins with it (`drafting`); 0 where nothing is known.
        """
        ...

    def propose(self, student_logits_NU: Tensor, key_N: Tensor) -> Sample:
        """The student's proposals [N], with which `draw` starts; collective over the TP group.

        The host does not wait for the device, and logits are not checked: `draw` does that.
        """
        ...

    def draw(
        self,
        proposal: Sample,
        student_logits_NU: Tensor,
        teacher_logits_NU: Tensor | None,
        key_N: Tensor,
    ) -> tuple[Tensor, TokenRecord]:
        """Token ids [N] and what is recorded of them; collective over the TP group.

        `proposal` is from `propose` with these logits and keys.

        Raises RowError, on all ranks alike, for logits that cannot be used.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class _TemperedPolicy:
    """What all policies are made of.

    Attributes:
        temperature: divides the logits of both models; 0 takes the student's most likely token.
        num_valid: ids from here on (padding of the vocabulary) do not exist.
        alignment: merges the stop ids of both models into one event; None leaves them apart.
    """

    temperature: float
    num_valid: int
    alignment: StopAlignment | None
    tp_group: dist.ProcessGroup | None

    def _tempered(self, logits_NU: Tensor, own_ids: tuple[int, ...], temperature: float) -> Tensor:
        """fp32 logits divided by `temperature`, then with the model's stop ids `own_ids` merged."""
        logits_NU = mask_invalid(logits_NU, self.num_valid, self.tp_group) / temperature
        if self.alignment is None:
            return logits_NU
        return align_stop_ids(logits_NU, own_ids, self.alignment, tp_group=self.tp_group)


@dataclass(frozen=True, kw_only=True)
class StudentPolicy(_TemperedPolicy):
    """The student's own distribution, with `alignment` over aligned stop events."""

    needs_teacher = False
    least_acceptance = 1.0

    def propose(self, student_logits_NU: Tensor, key_N: Tensor) -> Sample:
        """A sample by the draft's noise; at temperature 0 the most likely id."""
        own_ids = () if self.alignment is None else self.alignment.student_ids
        logits_NU = self._tempered(student_logits_NU, own_ids, self.temperature or 1.0)
        if self.temperature == 0:
            return most_likely(logits_NU, tp_group=self.tp_group)
        return sample_softmax(logits_NU, key_N, Purpose.DRAFT, tp_group=self.tp_group)

    def draw(
        self,
        proposal: Sample,
        student_logits_NU: Tensor,
        teacher_logits_NU: Tensor | None,
        key_N: Tensor,
    ) -> tuple[Tensor, TokenRecord]:
        """The proposal itself; its log-probability is that at temperature 1 where it is 0."""
        token_ids_N, logprobs_N = proposal
        raise_at_row({"student logits hold a NaN, a +inf or no id": ~logprobs_N.isfinite()})
        zeros = torch.zeros_like(logprobs_N)
        record = TokenRecord(
            student_logprobs=logprobs_N,
            teacher_logprobs=torch.full_like(logprobs_N, torch.nan),
            behavior_logprobs=logprobs_N,
            blend_coef=zeros,
            kl_student=zeros,
            accepted=torch.ones_like(zeros, dtype=torch.bool),
        )
        return token_ids_N, record


class Guidance(NamedTuple):
    """What a policy that asks the teacher knows of N prefixes."""

    student: Softmax
    teacher: Softmax
    behavior_NU: Tensor
    """log mu on this shard, fp32."""
    blend_coef_N: Tensor
    """0 for p, 1 for q, between them on the path p^(1-β) q^β; NaN where mu is not on it."""
    kl_student_N: Tensor
    """KL(mu||p) in nats."""


@dataclass(frozen=True, kw_only=True)
class GuidedPolicy(_TemperedPolicy, ABC):
    """A policy that asks the teacher; a subclass says what its distribution is (`solve`)."""

    alignment: StopAlignment
    needs_teacher = True

    @property
    @abstractmethod
    def least_acceptance(self) -> float: ...

    @abstractmethod
    def solve(self, student_logits_NU: Tensor, teacher_logits_NU: Tensor) -> Guidance:
        """The distributions at N prefixes, from both models' logits; collective over the TP
        group: logits sharded, the fields of size N replicated; not differentiable."""

    def propose(self, student_logits_NU: Tensor, key_N: Tensor) -> Sample:
        """A sample of the student, by the draft's noise."""
        student = StudentPolicy(
            temperature=self.temperature,
            num_valid=self.num_valid,
            alignment=self.alignment,
            tp_group=self.tp_group,
        )
        return student.propose(student_logits_NU, key_N)

    def draw(
        self,
        proposal: Sample,
        student_logits_NU: Tensor,
        teacher_logits_NU: Tensor | None,
        key_N: Tensor,
    ) -> tuple[Tensor, TokenRecord]:
        """Draw from mu with the position's key, starting with the proposal."""
        assert teacher_logits_NU is not None
        guidance = self.solve(student_logits_NU, teacher_logits_NU)
        student_NU, behavior_NU = guidance.student.logprobs(), guidance.behavior_NU
        drawn = draw_tokens(
            student_NU,
            behavior_NU,
            proposal.token_ids,
            key_N,
            tp_group=self.tp_group,
        )
        student_N, teacher_N, behavior_N = gather_each_at(
            (student_NU, guidance.teacher.logits_NU, behavior_NU),
            drawn.token_ids,
            tp_group=self.tp_group,
        )
        is_finite_N = behavior_N.isfinite() & guidance.kl_student_N.isfinite()
        raise_at_row({"the behavior policy is not finite": ~is_finite_N})
        record = TokenRecord(
            student_logprobs=student_N,
            teacher_logprobs=guidance.teacher.normalize(teacher_N),
            behavior_logprobs=behavior_N,
            blend_coef=guidance.blend_coef_N,
            kl_student=guidance.kl_student_N,
            accepted=drawn.accepted,
        )
        return drawn.token_ids, record

    def _student_logits(self, logits_NU: Tensor) -> Tensor:
        return self._tempered(logits_NU, self.alignment.student_ids, self.temperature)

    def _teacher_logits(self, logits_NU: Tensor, temperature: float | None = None) -> Tensor:
        """At the rollout temperature or another one."""
        if temperature is None:
            temperature = self.temperature
        return self._tempered(logits_NU, self.alignment.teacher_ids, temperature)


@dataclass(frozen=True, kw_only=True)
class BlendPolicy(GuidedPolicy):
    """The trust-region behavior policy: nearest the teacher within `kl_budget` nats of the student.

    Plyusov et al., arXiv 2605.31159; see `solver`.
    """

    kl_budget: float

    @property
    def least_acceptance(self) -> float:
        """1 - sqrt(budget / 2), since TV(p, mu) <= sqrt(KL(mu||p) / 2) (Pinsker)."""
        return max(0.0, 1.0 - (self.kl_budget / 2) ** 0.5)

    def solve(self, student_logits_NU: Tensor, teacher_logits_NU: Tensor) -> Guidance:
        """At most eight all-gathers, those of `solve_behavior`, besides the stop alignment's."""
        behavior = solve_behavior(
            self._student_logits(student_logits_NU),
            self._teacher_logits(teacher_logits_NU),
            self.kl_budget,
            tp_group=self.tp_group,
        )
        return Guidance(
            behavior.student,
            behavior.teacher,
            behavior.logprobs(),
            behavior.blend_coef,
            behavior.kl_student,
        )


@dataclass(frozen=True, kw_only=True)
class TeacherPolicy(GuidedPolicy):
    """The teacher's distribution: standard speculative decoding with the student as the drafter.

    Leviathan et al., arXiv 2211.17192. Acceptance is 1 - TV(p, q), which may be anything.
    """

    least_acceptance = 0.0

    def solve(self, student_logits_NU: Tensor, teacher_logits_NU: Tensor) -> Guidance:
        """Three all-gathers besides the stop alignment's."""
        student, teacher = (
            softmax(logits_NU, tp_group=self.tp_group, name=name)
            for name, logits_NU in (
                ("student", self._student_logits(student_logits_NU)),
                ("teacher", self._teacher_logits(teacher_logits_NU)),
            )
        )
        teacher_NU = teacher.logprobs()
        kl_N = kl_divergence(teacher_NU, student.logprobs(), tp_group=self.tp_group)
        return Guidance(student, teacher, teacher_NU, torch.ones_like(kl_N), kl_N)


@dataclass(frozen=True, kw_only=True)
class SKDPolicy(GuidedPolicy):
    """Speculative knowledge distillation: the student's draw, unless the teacher finds it unlikely.

    A draw that is not among the teacher's `top_k` most likely ids is replaced by a fresh draw of
    the teacher at `teacher_temperature` (Xu et al., arXiv 2410.11325, algorithm 1); see
    `skd_logprobs`. The law is that of those two draws; but drawn by maximal coupling, a proposal
    that the replacement might have been, too, may stay, so that acceptance is at least p(top-k),
    which may be anything.
    """

    top_k: int
    teacher_temperature: float
    least_acceptance = 0.0

    def solve(self, student_logits_NU: Tensor, teacher_logits_NU: Tensor) -> Guidance:
        """Six all-gathers besides the stop alignment's. `blend_coef` is NaN: mu is on no path.

        Raises ValueError, on all ranks alike, where fewer than `top_k` ids exist.
        """
        student, teacher, fresh = (
            softmax(logits_NU, tp_group=self.tp_group, name=name)
            for name, logits_NU in (
                ("student", self._student_logits(student_logits_NU)),
                ("teacher", self._teacher_logits(teacher_logits_NU)),
                ("teacher", self._teacher_logits(teacher_logits_NU, self.teacher_temperature)),
            )
        )
        is_likely_NU = is_in_topk(teacher.logits_NU, self.top_k, tp_group=self.tp_group)
        student_NU = student.logprobs()
        behavior_NU = skd_logprobs(
            student_NU, fresh.logprobs(), is_likely_NU, tp_group=self.tp_group
        )
        kl_N = kl_divergence(behavior_NU, student_NU, tp_group=self.tp_group)
        return Guidance(student, teacher, behavior_NU, torch.full_like(kl_N, torch.nan), kl_N)


def is_in_topk(logits_NU: Tensor, k: int, *, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return which ids of this shard are among their row's `k` largest, [N, U] bool.

    Ties go to the lowest id. One all-gather over `tp_group` (see `vocab_parallel.topk`, also for
    the errors); logits and result sharded; not differentiable.
    """
    width = logits_NU.shape[-1]
    start, stop = vocab_range(width, tp_group)
    _, ids_NK = topk(logits_NU, k, tp_group=tp_group)
    is_mine_NK = (ids_NK >= start) & (ids_NK < stop)
    # Ids of other shards meet in one more column, which is cut off.
    columns_NK = torch.where(is_mine_NK, ids_NK - start, width)
    in_topk = torch.zeros(len(ids_NK), width + 1, dtype=torch.bool, device=logits_NU.device)
    return in_topk.scatter_(-1, columns_NK, True)[:, :width]


def skd_logprobs(
    student_logprobs_NU: Tensor,
    fresh_logprobs_NU: Tensor,
    is_likely_NU: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Return log mu on this shard, mu(y) = p(y) 1[y is likely] + p(not likely) * fresh(y); [N, U].

    The law of a draw from p that is replaced by one from `fresh` unless it is likely. One
    all-gather over `tp_group`, of the mass that is replaced (summed in float64); arguments and
    result sharded, fp32; not differentiable.
    """
    replaced_NU = student_logprobs_NU.exp().masked_fill_(is_likely_NU, 0.0)
    replaced_N1 = replaced_NU.sum(dim=-1, keepdim=True, dtype=torch.float64)
    log_replaced_N1 = all_gather(replaced_N1, tp_group).sum(dim=0).log().float()
    kept_NU = student_logprobs_NU.masked_fill(~is_likely_NU, -torch.inf)
    return torch.logaddexp(kept_NU, fresh_logprobs_NU + log_replaced_N1)


def kl_divergence(
    logp_NU: Tensor, logq_NU: Tensor, *, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Return KL(p||q) of each row in nats, [N] fp32, at least 0; from normalized log-probabilities.

    One all-gather over `tp_group`; log-probabilities sharded, result replicated; sums in float64;
    not differentiable. Ids without mass in p contribute nothing.
    """
    terms_NU = logp_NU.exp().mul_(logp_NU - logq_NU)
    terms_NU.masked_fill_(logp_NU == -torch.inf, 0.0)  # 0 * inf, or inf - inf, is NaN
    sum_N = all_gather(terms_NU.sum(dim=-1, dtype=torch.float64), tp_group).sum(dim=0)
    return sum_N.clamp_min(0).float()  # below 0 by rounding alone: the sum is over all ids
