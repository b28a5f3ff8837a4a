"""Drawing a token from one distribution, starting from a proposal of another: maximal coupling.

p = student, mu = behavior policy. A position's token depends on its two distributions and its key
alone, so that any number of positions can be drawn at once.

Shapes: N rows (prefixes), M a subset of them, U this rank's vocabulary shard.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.behavior.sampling import sample_weights
from trb_megatron.distributed.vocab_parallel import all_gather, gather_each_at
from trb_megatron.uniforms import Purpose, acceptance_uniforms

# A residual mass below this is rounding of fp32 log-probabilities.
_RESIDUAL_FLOOR = 1e-6


class Draw(NamedTuple):
    """Tokens drawn from the behavior policy; each field is [N] and replicated."""

    token_ids: Tensor
    """int64, distributed as the behavior policy."""
    accepted: Tensor
    """bool, whether the proposal was accepted (where rounding leaves no residual it stays, too)."""


def accept_tokens(
    student_logprob_N: Tensor, behavior_logprob_N: Tensor, u_accept_N: Tensor
) -> Tensor:
    """Accept a proposal when u < mu(y) / p(y), given its log-probabilities; [N] bool."""
    return u_accept_N < (behavior_logprob_N - student_logprob_N).double().exp()


def sample_residual(
    student_logprobs_NU: Tensor,
    behavior_logprobs_NU: Tensor,
    proposed_ids_N: Tensor,
    key_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Sample (mu - p)+ normalized, for proposals that were not accepted, [N] int64.

    Where its mass is below rounding the proposal stays. Three all-gathers over `tp_group`;
    log-probabilities sharded, the rest replicated.
    """
    residual_NU = (behavior_logprobs_NU.exp() - student_logprobs_NU.exp()).clamp_min_(0)
    mass_N = all_gather(residual_NU.sum(dim=-1, dtype=torch.float64), tp_group).sum(dim=0)
    (rows_M,) = (mass_N > _RESIDUAL_FLOOR).nonzero(as_tuple=True)
    token_ids_N = proposed_ids_N.clone()
    token_ids_N[rows_M] = sample_weights(
        residual_NU[rows_M], key_N[rows_M], Purpose.RESIDUAL, tp_group=tp_group
    )
    return token_ids_N


def draw_tokens(
    student_logprobs_NU: Tensor,
    behavior_logprobs_NU: Tensor,
    proposed_ids_N: Tensor,
    key_N: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
) -> Draw:
    """Draw a token per position from the behavior policy, starting from the student's proposal.

    The proposal y ~ p, which `sample_softmax` takes by the key and `Purpose.DRAFT`, is kept when
    the position's uniform is below mu(y) / p(y); otherwise the token comes from (mu - p)+ (maximal
    coupling, as in speculative sampling, Leviathan et al., arXiv 2211.17192, section 2.3). The law
    is exactly mu. Where both are bitwise equal the proposal is always kept.

    At most four all-gathers over `tp_group`; log-probabilities sharded [N, U], proposals, keys
    (`uniforms.position_keys`) and results replicated; not differentiable.
    """
    student_N, behavior_N = gather_each_at(
        (student_logprobs_NU, behavior_logprobs_NU), proposed_ids_N, tp_group=tp_group
    )
    accepted_N = accept_tokens(student_N, behavior_N, acceptance_uniforms(key_N))
    token_ids_N = proposed_ids_N.clone()
    (rows_M,) = (~accepted_N).nonzero(as_tuple=True)
    if len(rows_M) > 0:
        token_ids_N[rows_M] = sample_residual(
            student_logprobs_NU[rows_M],
            behavior_logprobs_NU[rows_M],
            proposed_ids_N[rows_M],
            key_N[rows_M],
            tp_group=tp_group,
        )
    return Draw(token_ids_N, accepted_N)
