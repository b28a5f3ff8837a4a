"""Gumbel-max on two levels: against a dense reference, its law, and how little rounding changes."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import vocab_shard
from trb_megatron.behavior.sampling import (
    CHUNK_WIDTH,
    most_likely,
    sample_softmax,
    sample_weights,
)
from trb_megatron.distributed.vocab_parallel import mask_invalid
from trb_megatron.uniforms import (
    Level,
    Purpose,
    acceptance_uniforms,
    exponential_noise,
    position_keys,
    rollout_key,
)

NUM_ROWS = 60
# Ids, and columns of all shards together: fewer than a chunk, shards that chunk boundaries cut,
# shards of padding alone, shards of whole chunks.
SIZES = {97: 97, 1500: 1500, 700: 2000, 4 * 2 * CHUNK_WIDTH: 4 * 2 * CHUNK_WIDTH}


def build_keys(num_rows: int, seed: int = 4) -> Tensor:
    """One position of as many rollouts."""
    return position_keys(rollout_key(seed, 0, torch.arange(num_rows), 0), torch.tensor(3))


def build_logits(num_ids: int) -> Tensor:
    """Rows with removed ids, most of the mass in the first or the last ids, and shards without."""
    generator = torch.Generator().manual_seed(num_ids)
    logits_NV = 2 * torch.randn(NUM_ROWS, num_ids, generator=generator)
    logits_NV[:, [0, 5, num_ids // 2]] = -torch.inf
    logits_NV[3:9, : num_ids - 7] = -1e4
    logits_NV[9:12, 10:] = -1e4
    logits_NV[12:15, : num_ids // 3] = -torch.inf
    return logits_NV


def dense_sample(weights_NV: Tensor, key_N: Tensor, purpose: Purpose) -> Tensor:
    """The rule as it is written down, with logarithms and Gumbel noise; [N]."""
    num_chunks = -(-weights_NV.shape[-1] // CHUNK_WIDTH)
    padding = num_chunks * CHUNK_WIDTH - weights_NV.shape[-1]
    weights_NCW = torch.nn.functional.pad(weights_NV.double(), (0, padding)).unflatten(
        -1, (num_chunks, CHUNK_WIDTH)
    )
    chunks_1C = torch.arange(num_chunks)[None]
    gumbel_NC = -exponential_noise(key_N, purpose, Level.CHUNK, chunks_1C).log()
    chunk_N = (weights_NCW.sum(-1).log() + gumbel_NC).argmax(-1)
    ids_NW = chunk_N[:, None] * CHUNK_WIDTH + torch.arange(CHUNK_WIDTH)
    gumbel_NW = -exponential_noise(key_N, purpose, Level.ID, ids_NW).log()
    logs_NW = weights_NCW[torch.arange(len(chunk_N)), chunk_N].log()
    return ids_NW.gather(-1, (logs_NW + gumbel_NW).argmax(-1, keepdim=True))[:, 0]


class Sampled(NamedTuple):
    """What the functions return for one vocabulary, each [N]."""

    ids: Tensor
    logprobs: Tensor
    residual_ids: Tensor
    weighted_ids: Tensor
    greedy_ids: Tensor
    greedy_logprobs: Tensor


def sample_all() -> dict[int, Sampled]:
    """On this rank's shards, which garbage fills."""
    group = current_group()
    key_N = build_keys(NUM_ROWS)
    found = {}
    for num_ids, num_columns in SIZES.items():
        padding = (0, num_columns - num_ids)
        logits_NV = torch.nn.functional.pad(build_logits(num_ids), padding, value=torch.nan)
        logits_NU = mask_invalid(vocab_shard(logits_NV, group), num_ids, group)
        found[num_ids] = Sampled(
            *sample_softmax(logits_NU, key_N, Purpose.DRAFT, tp_group=group),
            sample_softmax(logits_NU, key_N, Purpose.RESIDUAL, tp_group=group).token_ids,
            sample_weights(logits_NU.exp(), key_N, Purpose.DRAFT, tp_group=group),
            *most_likely(logits_NU, tp_group=group),
        )
    return found


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_equals_the_dense_rule_at_any_number_of_ranks(tp_size: int) -> None:
    key_N = build_keys(NUM_ROWS)
    results = on_ranks(sample_all, tp_size)
    for num_ids in SIZES:
        logits_NV = build_logits(num_ids).double()
        logprobs_NV = logits_NV.log_softmax(-1)
        expected_N = dense_sample(logprobs_NV.exp(), key_N, Purpose.DRAFT)
        residual_N = dense_sample(logprobs_NV.exp(), key_N, Purpose.RESIDUAL)
        for result in results:
            sampled = result[num_ids]
            assert sampled.ids.dtype == torch.int64
            assert torch.equal(sampled.ids, expected_N)
            assert torch.equal(sampled.residual_ids, residual_N)
            assert torch.equal(sampled.weighted_ids, expected_N)
            assert torch.equal(sampled.greedy_ids, logits_NV.argmax(-1))
            for ids_N, logprobs_N in (sampled[:2], sampled[4:]):
                at_ids_N = logprobs_NV.gather(-1, ids_N[:, None])[:, 0]
                torch.testing.assert_close(logprobs_N.double(), at_ids_N, rtol=1e-6, atol=2e-6)
            for field, first in zip(sampled, results[0][num_ids], strict=True):
                assert torch.equal(field, first)


def test_ties_of_the_most_likely_go_to_the_lowest_id() -> None:
    logits_NU = torch.zeros(2, 700)
    logits_NU[1, [300, 650]] = 1.0
    assert most_likely(logits_NU, tp_group=None).token_ids.tolist() == [0, 300]


# The law: one row of logits and many keys.

NUM_DRAWS = 60_000
NUM_SHARDED_DRAWS = 6_000  # the first of them, on several ranks: each makes the noise of all ids


def build_row(num_ids: int) -> Tensor:
    """A peaked distribution over several chunks; the first ids have the same mass as the first
    chunks, so that noise which they shared would show."""
    generator = torch.Generator().manual_seed(0)
    logits_V = 1.5 * torch.randn(num_ids, generator=generator) - 3
    logits_V[: num_ids // CHUNK_WIDTH + 1] = 2.0
    return logits_V


def p_value(ids_N: Tensor, logits_V: Tensor) -> float:
    """Of a chi-square test; rare ids are counted together."""
    expected_V = logits_V.double().softmax(-1).numpy() * len(ids_N)
    counts_V = np.bincount(ids_N.numpy(), minlength=len(expected_V))
    is_rare_V = expected_V < 10
    counts = np.append(counts_V[~is_rare_V], counts_V[is_rare_V].sum())
    expected = np.append(expected_V[~is_rare_V], expected_V[is_rare_V].sum())
    occurs = expected > 0
    return float(chisquare(counts[occurs], expected[occurs]).pvalue)


def draw_row(
    logits_V: Tensor, purpose: Purpose = Purpose.DRAFT, num_draws: int = NUM_DRAWS
) -> Tensor:
    """Draws from one row, on this rank's shard."""
    group = current_group()
    logits_NU = vocab_shard(logits_V[None], group, fill=-torch.inf).expand(num_draws, -1)
    return sample_softmax(logits_NU, build_keys(num_draws), purpose, tp_group=group).token_ids


def test_samples_follow_the_softmax() -> None:
    logits_V = build_row(5 * CHUNK_WIDTH + 100)
    ids_N = draw_row(logits_V)
    assert p_value(ids_N, logits_V) > 1e-3
    chunks_V = torch.arange(len(logits_V)) // CHUNK_WIDTH
    chunk_logits_C = torch.stack([logits_V[chunks_V == c].logsumexp(0) for c in range(6)])
    assert p_value(ids_N // CHUNK_WIDTH, chunk_logits_C) > 1e-3
    assert p_value(ids_N, logits_V + 0.2 * (torch.arange(len(logits_V)) % 2)) < 1e-6


def draw_on_shards() -> Tensor:
    return draw_row(build_row(5 * CHUNK_WIDTH + 100), num_draws=NUM_SHARDED_DRAWS)


@pytest.mark.parametrize("tp_size", TP_SIZES[1:])
def test_samples_on_shards_follow_the_softmax(tp_size: int) -> None:
    logits_V = build_row(5 * CHUNK_WIDTH + 100)
    first, *others = on_ranks(draw_on_shards, tp_size)
    assert p_value(first, logits_V) > 1e-3
    assert all(torch.equal(first, other) for other in others)


def test_a_residual_is_independent_of_the_draft_and_the_acceptance() -> None:
    """Noise that draft and residual shared would let them agree far too often."""
    logits_V = build_row(3 * CHUNK_WIDTH)
    draft_N, residual_N = draw_row(logits_V), draw_row(logits_V, Purpose.RESIDUAL)
    assert p_value(residual_N, logits_V) > 1e-3
    chance = float(logits_V.double().softmax(-1).square().sum())
    spread = (chance * (1 - chance) / NUM_DRAWS) ** 0.5
    assert abs(float((draft_N == residual_N).double().mean()) - chance) < 4 * spread
    is_low_N = acceptance_uniforms(build_keys(NUM_DRAWS)) < 0.3
    assert p_value(draft_N[is_low_N], logits_V) > 1e-3
    assert p_value(residual_N[is_low_N], logits_V) > 1e-3


@pytest.mark.parametrize("num_ids", [50_000, 151_936])
def test_rounding_changes_few_tokens(num_ids: int) -> None:
    """No more than 10 times the total variation; an inverse CDF changes hundreds of times it."""
    generator = torch.Generator().manual_seed(num_ids)
    num_draws = 4_000 if num_ids < 100_000 else 1_500
    logits_V = 2.5 * torch.randn(num_ids, generator=generator)
    logits_V[::1000] += 6
    for size in (1e-5, 3e-3):  # of fp32 and of bf16 logits
        rounded_V = logits_V + size * torch.randn(num_ids, generator=generator)
        drawn = [
            sample_softmax(
                row_V.expand(num_draws, -1), build_keys(num_draws), Purpose.DRAFT, tp_group=None
            ).token_ids
            for row_V in (logits_V, rounded_V)
        ]
        variation_V = logits_V.double().softmax(-1) - rounded_V.double().softmax(-1)
        limit = 10 * 0.5 * float(variation_V.abs().sum()) * num_draws
        assert 0.01 < limit < num_draws / 5
        assert int((drawn[0] != drawn[1]).sum()) <= limit


# What cannot be drawn from.


def test_ids_without_mass_are_never_drawn() -> None:
    weights_NU = torch.zeros(200, 900)
    weights_NU[:, [255, 256, 511, 899]] = torch.tensor([1e-30, 2e-30, 1e-30, 3e-30])
    ids_N = sample_weights(weights_NU, build_keys(200), Purpose.DRAFT, tp_group=None)
    assert set(ids_N.tolist()) == {255, 256, 511, 899}


def test_a_broken_softmax_gives_some_id_and_shows_in_its_logprob() -> None:
    logits_NU = torch.zeros(4, 300)
    logits_NU[0, 7], logits_NU[1, 7], logits_NU[2] = torch.nan, torch.inf, -torch.inf
    key_N = build_keys(4)
    for ids_N, logprobs_N in (
        sample_softmax(logits_NU, key_N, Purpose.DRAFT, tp_group=None),
        most_likely(logits_NU, tp_group=None),
    ):
        assert ((ids_N >= 0) & (ids_N < 300)).all()
        assert logprobs_N.isfinite().tolist() == [False, False, False, True]


def refuse_weights() -> list[str]:
    """Messages about weights that are unusable in the last shard."""
    group = current_group()
    num_ranks = 1 if group is None else group.size()
    messages = []
    for weight in (0.0, torch.nan, torch.inf):
        weights_NV = torch.zeros(2, 300 * num_ranks)
        weights_NV[0], weights_NV[1, -1] = 1.0, weight
        with pytest.raises(ValueError) as error:
            weights_NU = vocab_shard(weights_NV, group)
            sample_weights(weights_NU, build_keys(2), Purpose.DRAFT, tp_group=group)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("tp_size", TP_SIZES)
def test_weights_without_a_finite_sum_are_refused_on_all_ranks(tp_size: int) -> None:
    for messages in on_ranks(refuse_weights, tp_size):
        assert messages == ["sampling weights have no finite sum in row 1"] * 3
