"""Policies: the distributions that rollouts are sampled from, and how a token is drawn from each.

A policy sees the logits of N prefixes on this rank's vocabulary shard, and the random numbers of
each. It knows nothing of caches, batches or draft lengths. A new policy is a class here.

Shapes: N prefixes, U this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.batch import TokenRecord
from trb_megatron.blending import StopAlignment, align_stop_ids, draw_tokens, solve_behavior
from trb_megatron.uniforms import Purpose, keyed_uniforms
from trb_megatron.vocab_parallel import (
    argmax,
    gather_at,
    gather_each_at,
    log_softmax_NU,
    mask_invalid,
    sample_inverse_cdf,
)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn and when they end.

    Attributes:
        temperature: divides the logits of both models; 0 takes the student's most likely token.
        max_response_tokens: a response that reaches it is cut.
        stop_ids: a response ends with the first of these; the token is part of it.
        seed, step: key the random numbers together with a request and a position.
        num_valid: ids from here on (padding of the vocabulary) do not exist.
    """

    temperature: float
    max_response_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    step: int
    num_valid: int


class Uniforms:
    """The random numbers at N positions of rollouts with the keys `key_N` (`uniforms`)."""

    def __init__(self, key_N: Tensor, position_N: Tensor) -> None:
        self._key_N, self._position_N = key_N, position_N

    def __getitem__(self, purpose: Purpose) -> Tensor:
        """Uniforms in [0, 1) of shape [N], float64, for one purpose."""
        return keyed_uniforms(self._key_N, self._position_N, purpose)


class Policy(Protocol):
    """A distribution over the next token, within `kl_budget` nats of the student.

    Decisions are identical on all tensor-parallel ranks.
    """

    @property
    def needs_teacher(self) -> bool: ...

    @property
    def kl_budget(self) -> float: ...

    def propose(self, student_logits_NU: Tensor, uniforms: Uniforms) -> Tensor:
        """The student's proposal [N], with which `draw` starts; collective over the TP group."""
        ...

    def draw(
        self, student_logits_NU: Tensor, teacher_logits_NU: Tensor | None, uniforms: Uniforms
    ) -> tuple[Tensor, TokenRecord]:
        """Token ids [N] and what is recorded of them; collective over the TP group."""
        ...


@dataclass(frozen=True)
class StudentPolicy:
    """The student's own distribution; with `alignment` over aligned stop events (`blending`)."""

    sampling: Sampling
    tp_group: dist.ProcessGroup | None = None
    alignment: StopAlignment | None = None
    needs_teacher = False
    kl_budget = 0.0

    def propose(self, student_logits_NU: Tensor, uniforms: Uniforms) -> Tensor:
        """Inverse-CDF sampling by the draft uniform, or argmax at temperature 0."""
        return self._sample(self._logprobs(student_logits_NU), uniforms)

    def draw(
        self, student_logits_NU: Tensor, teacher_logits_NU: Tensor | None, uniforms: Uniforms
    ) -> tuple[Tensor, TokenRecord]:
        """The proposal itself."""
        logprobs_NU = self._logprobs(student_logits_NU)
        token_ids_N = self._sample(logprobs_NU, uniforms)
        logprobs_N = gather_at(logprobs_NU, token_ids_N, tp_group=self.tp_group)
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

    def _logprobs(self, logits_NU: Tensor) -> Tensor:
        """Log-probabilities on this shard; at temperature 0 those of temperature 1."""
        logits_NU = mask_invalid(logits_NU, self.sampling.num_valid, self.tp_group)
        logits_NU = logits_NU / (self.sampling.temperature or 1.0)
        if self.alignment is not None:
            logits_NU = align_stop_ids(
                logits_NU, self.alignment.student_ids, self.alignment, tp_group=self.tp_group
            )
        return log_softmax_NU(logits_NU, tp_group=self.tp_group)

    def _sample(self, logprobs_NU: Tensor, uniforms: Uniforms) -> Tensor:
        if self.sampling.temperature == 0:
            return argmax(logprobs_NU, tp_group=self.tp_group)
        return sample_inverse_cdf(
            logprobs_NU.exp(), uniforms[Purpose.DRAFT], tp_group=self.tp_group
        )


@dataclass(frozen=True)
class BlendPolicy:
    """The trust-region behavior policy: nearest the teacher within `kl_budget` of the student.

    Plyusov et al., arXiv 2605.31159; drawn by maximal coupling (`blending.draw_tokens`).
    """

    sampling: Sampling
    kl_budget: float
    alignment: StopAlignment
    tp_group: dist.ProcessGroup | None = None
    needs_teacher = True

    def propose(self, student_logits_NU: Tensor, uniforms: Uniforms) -> Tensor:
        """A token of the student, by the draft uniform."""
        student = StudentPolicy(self.sampling, self.tp_group, self.alignment)
        return student.propose(student_logits_NU, uniforms)

    def draw(
        self, student_logits_NU: Tensor, teacher_logits_NU: Tensor | None, uniforms: Uniforms
    ) -> tuple[Tensor, TokenRecord]:
        """Solve for the blend of each row, then draw from it with the position's three uniforms."""
        assert teacher_logits_NU is not None
        behavior = solve_behavior(
            self._aligned(student_logits_NU, self.alignment.student_ids),
            self._aligned(teacher_logits_NU, self.alignment.teacher_ids),
            self.kl_budget,
            tp_group=self.tp_group,
        )
        student_NU, behavior_NU = behavior.student.logprobs(), behavior.logprobs()
        drawn = draw_tokens(
            student_NU,
            behavior_NU,
            uniforms[Purpose.DRAFT],
            uniforms[Purpose.ACCEPT],
            uniforms[Purpose.RESIDUAL],
            tp_group=self.tp_group,
        )
        student_N, teacher_N, behavior_N = gather_each_at(
            (student_NU, behavior.teacher.logits_NU, behavior_NU),
            drawn.token_ids,
            tp_group=self.tp_group,
        )
        record = TokenRecord(
            student_logprobs=student_N,
            teacher_logprobs=behavior.teacher.normalize(teacher_N),
            behavior_logprobs=behavior_N,
            blend_coef=behavior.blend_coef,
            kl_student=behavior.kl_student,
            accepted=drawn.accepted,
        )
        return drawn.token_ids, record

    def _aligned(self, logits_NU: Tensor, own_ids: tuple[int, ...]) -> Tensor:
        masked_NU = mask_invalid(logits_NU, self.sampling.num_valid, self.tp_group)
        scaled_NU = masked_NU / self.sampling.temperature
        return align_stop_ids(scaled_NU, own_ids, self.alignment, tp_group=self.tp_group)
