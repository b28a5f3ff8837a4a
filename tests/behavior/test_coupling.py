"""The draw by maximal coupling: its law, at any number of ranks and in any batch."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.behavior.cases import NUM_VALID, build_pair
from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import vocab_shard
from tests.reference import dense_blend
from trb_megatron.behavior.coupling import accept_tokens, draw_tokens
from trb_megatron.behavior.sampling import sample_softmax
from trb_megatron.behavior.solver import solve_behavior
from trb_megatron.distributed.vocab_parallel import gather_at, mask_invalid
from trb_megatron.uniforms import Purpose, acceptance_uniforms, position_keys, rollout_key

NUM_DRAWS = 30_000
NUM_SHARDED_DRAWS = 1_000  # the first of them, on several ranks


class Inputs(NamedTuple):
    """One prefix repeated."""

    logp_NU: Tensor
    logmu_NU: Tensor
    key_N: Tensor


def build_draw_inputs(kl_budget: float, num_draws: int = NUM_DRAWS) -> Inputs:
    """The behavior policy of that budget, on this rank's shard."""
    group = current_group()
    student_NU, teacher_NU = (
        mask_invalid(vocab_shard(full_NV, group), NUM_VALID, group)
        for full_NV in build_pair(1.5, 2, 1, NUM_VALID, seed=7)
    )
    behavior = solve_behavior(student_NU, teacher_NU, kl_budget, tp_group=group)
    return Inputs(
        behavior.student.logprobs().expand(num_draws, -1),
        behavior.logprobs().expand(num_draws, -1),
        build_keys(num_draws),
    )


def build_keys(num_draws: int) -> Tensor:
    """Positions of one rollout."""
    return position_keys(rollout_key(5, 0, 0, 0), torch.arange(num_draws))


def propose(logp_NU: Tensor, key_N: Tensor) -> Tensor:
    """The proposals of the student, [N]."""
    return sample_softmax(logp_NU, key_N, Purpose.DRAFT, tp_group=current_group()).token_ids


class Drawn(NamedTuple):
    """Draws and the proposals that they started from, each [N]."""

    token_ids: Tensor
    accepted: Tensor
    proposed_ids: Tensor


def measure_draws(num_draws: int = NUM_SHARDED_DRAWS) -> dict[float, Drawn]:
    """The draws at each budget."""
    group = current_group()
    results = {}
    for kl_budget in (0.0, 0.05, 0.5, 1e9):
        logp_NU, logmu_NU, key_N = build_draw_inputs(kl_budget, num_draws)
        proposed_N = propose(logp_NU, key_N)
        draw = draw_tokens(logp_NU, logmu_NU, proposed_N, key_N, tp_group=group)
        results[kl_budget] = Drawn(*draw, proposed_N)
    return results


@pytest.fixture(scope="module")
def single() -> dict[float, Drawn]:
    return measure_draws(NUM_DRAWS)


def chi_square_p_value(ids_N: Tensor, logprobs_V: Tensor) -> float:
    expected_V = logprobs_V.exp() * len(ids_N)
    counts_V = torch.bincount(ids_N, minlength=len(logprobs_V))[: len(logprobs_V)]
    assert (expected_V > 10).all()
    chi_square = ((counts_V - expected_V) ** 2 / expected_V).sum()
    degrees = torch.tensor(len(expected_V) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, chi_square / 2))


def exact_behavior(kl_budget: float) -> tuple[Tensor, Tensor]:
    """log p and log mu of the drawn prefix, [V] float64."""
    student_NV, teacher_NV = build_pair(1.5, 2, 1, NUM_VALID, seed=7)
    budget_N = torch.tensor([kl_budget], dtype=torch.float64)
    logmu_NV = dense_blend(student_NV, teacher_NV, budget_N).logprobs
    return student_NV.double().log_softmax(-1)[0], logmu_NV[0]


@pytest.mark.parametrize("kl_budget", [0.05, 0.5, 1e9])
def test_draws_follow_the_behavior_policy(kl_budget: float, single: dict[float, Drawn]) -> None:
    logp_V, logmu_V = exact_behavior(kl_budget)
    draw = single[kl_budget]
    assert chi_square_p_value(draw.token_ids, logmu_V) > 1e-3
    assert chi_square_p_value(draw.proposed_ids, logp_V) > 1e-3
    assert chi_square_p_value(draw.proposed_ids, logmu_V) < 1e-3
    acceptance = 1 - 0.5 * float((logp_V.exp() - logmu_V.exp()).abs().sum())
    deviation = (acceptance * (1 - acceptance) / NUM_DRAWS) ** 0.5
    assert abs(float(draw.accepted.double().mean()) - acceptance) < 4 * deviation
    assert torch.equal(draw.token_ids == draw.proposed_ids, draw.accepted)


@pytest.mark.parametrize("tp_size", TP_SIZES[1:])
def test_draws_do_not_depend_on_tp(tp_size: int, single: dict[float, Drawn]) -> None:
    for result in on_ranks(measure_draws, tp_size):
        for kl_budget, draw in result.items():
            for field, expected in zip(draw, single[kl_budget], strict=True):
                assert torch.equal(field, expected[:NUM_SHARDED_DRAWS])


def test_draws_do_not_depend_on_their_batch() -> None:
    student_NV, teacher_NV = build_pair(2, 3, num_rows=60, size=400)
    behavior = solve_behavior(student_NV, teacher_NV, 0.3)
    key_N = build_keys(60)
    logp_NU = behavior.student.logprobs()
    inputs = logp_NU, behavior.logprobs(), propose(logp_NU, key_N), key_N
    draw = draw_tokens(*inputs, tp_group=None)
    assert not draw.accepted.all()
    for row in range(60):
        rows = slice(row, row + 1)
        alone = draw_tokens(*(x[rows] for x in inputs), tp_group=None)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, draw, strict=True))


def test_without_a_budget_the_student_is_sampled(single: dict[float, Drawn]) -> None:
    """And, as draws do not depend on it, at any number of ranks."""
    logp_NU, logmu_NU, key_N = build_draw_inputs(0.0)
    assert torch.equal(logp_NU, logmu_NU)
    plain_N = propose(logp_NU, key_N)
    assert single[0.0].accepted.all()
    assert torch.equal(single[0.0].token_ids, plain_N)


def keep_every_proposal(logp_NU: Tensor, logmu_NU: Tensor, key_N: Tensor) -> Tensor:
    return propose(logp_NU, key_N)


def redraw_from_behavior(logp_NU: Tensor, logmu_NU: Tensor, key_N: Tensor) -> Tensor:
    proposed_N = propose(logp_NU, key_N)
    logp_N, logmu_N = (gather_at(x, proposed_N, tp_group=None) for x in (logp_NU, logmu_NU))
    fresh_N = sample_softmax(logmu_NU, key_N, Purpose.RESIDUAL, tp_group=None).token_ids
    accepted_N = accept_tokens(logp_N, logmu_N, acceptance_uniforms(key_N))
    return torch.where(accepted_N, proposed_N, fresh_N)


def propose_by_the_noise_of_the_residual(
    logp_NU: Tensor, logmu_NU: Tensor, key_N: Tensor
) -> Tensor:
    proposed_N = sample_softmax(logp_NU, key_N, Purpose.RESIDUAL, tp_group=None).token_ids
    return draw_tokens(logp_NU, logmu_NU, proposed_N, key_N, tp_group=None).token_ids


@pytest.mark.parametrize(
    "rule", [keep_every_proposal, redraw_from_behavior, propose_by_the_noise_of_the_residual]
)
def test_a_wrong_rule_is_noticed(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    logp_NU, logmu_NU, key_N = build_draw_inputs(0.5)
    tokens_N = rule(logp_NU, logmu_NU, key_N)
    assert chi_square_p_value(tokens_N, exact_behavior(0.5)[1]) < 1e-3
