"""Vocabulary-shard maths against dense torch, at TP 1, 2 and 4, with ties, -inf and padding."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import ShardWidthGuard, run_distributed, vocab_shard
from trb_megatron.distributed.vocab_parallel import (
    all_gather,
    argmax,
    gather_at,
    mask_invalid,
    sample_inverse_cdf,
    sample_softmax,
    softmax,
    topk,
    vocab_range,
)

NUM_ROWS, NUM_VALID, TOP_K = 40, 97, 30


def build_logits() -> Tensor:
    """Rows with many ties, removed ids, and mass in the first or last shard alone."""
    generator = torch.Generator().manual_seed(1)
    logits_NV = torch.randint(-3, 4, (NUM_ROWS, NUM_VALID), generator=generator).float()
    logits_NV[:, [0, 5, 60]] = -torch.inf
    logits_NV[3:5, :90] = -1e4
    logits_NV[5, 10:] = -1e4
    return logits_NV


def build_uniforms() -> Tensor:
    uniforms_N = torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(2)).double()
    uniforms_N[:6] = torch.tensor([0.0, 1 - 2**-53, 0.5, 1 - 2**-53, 0.0, 1.0], dtype=torch.float64)
    return uniforms_N


def build_wide_weights() -> Tensor:
    """Several chunks of columns per shard; some without mass, and rows with mass in one place."""
    generator = torch.Generator().manual_seed(3)
    weights_NV = torch.rand(NUM_ROWS, 1500, generator=generator).square()
    weights_NV[:, 100:300] = 0
    weights_NV[:, -200:] = 0
    weights_NV[10:20] = 0
    weights_NV[10:20, 7::150] = 1e-30
    weights_NV[20, :] = 0
    weights_NV[20, 1280] = 1
    return weights_NV


def measure(tp_group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Everything on this rank's shard, gathered where it is sharded."""
    group = dist.group.WORLD if dist.is_initialized() else tp_group
    shard_NU = mask_invalid(vocab_shard(build_logits(), group), NUM_VALID, group)
    logprobs_NU = softmax(shard_NU, tp_group=group).logprobs()
    values_NK, ids_NK = topk(shard_NU, TOP_K, tp_group=group)
    weights_NU = logprobs_NU.exp()
    return {
        "range": vocab_range(shard_NU.shape[-1], group),
        "logprobs": all_gather(logprobs_NU, group).transpose(0, 1).flatten(1)[:, :NUM_VALID],
        "values": values_NK,
        "ids": ids_NK,
        "gathered": gather_at(shard_NU, ids_NK, tp_group=group),
        "gathered_row": gather_at(shard_NU, ids_NK[:, 0], tp_group=group),
        "argmax": argmax(shard_NU, tp_group=group),
        "sampled": sample_inverse_cdf(weights_NU, build_uniforms(), tp_group=group),
        "wide": sample_inverse_cdf(
            vocab_shard(build_wide_weights(), group, fill=0), build_uniforms(), tp_group=group
        ),
        "softmax": torch.stack(sample_softmax(shard_NU, build_uniforms(), tp_group=group)),
        "scaled": sample_inverse_cdf(weights_NU * 7, build_uniforms(), tp_group=group),
    }


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if request.param == 1:
        return [measure()]
    return run_distributed(measure, request.param)


def test_replicated_results_are_bit_identical(results: list[dict[str, Any]]) -> None:
    for other in results[1:]:
        for key in set(results[0]) - {"range"}:
            assert torch.equal(results[0][key], other[key]), key
    ranges = [result["range"] for result in results]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]


def test_log_softmax(results: list[dict[str, Any]]) -> None:
    expected_NV = build_logits().double().log_softmax(-1)
    torch.testing.assert_close(results[0]["logprobs"].double(), expected_NV, rtol=1e-6, atol=1e-6)


def test_topk_and_argmax_break_ties_by_id(results: list[dict[str, Any]]) -> None:
    rows = build_logits().tolist()
    expected = [sorted(range(NUM_VALID), key=lambda i: (-row[i], i))[:TOP_K] for row in rows]
    assert results[0]["ids"].tolist() == expected
    assert results[0]["argmax"].tolist() == [ids[0] for ids in expected]
    expected_NK = build_logits().gather(-1, torch.tensor(expected))
    assert torch.equal(results[0]["values"], expected_NK.double())


@pytest.mark.parametrize("num_columns", [700, 64 * 50, 64 * 50 + 13])
def test_topk_of_a_large_vocabulary(num_columns: int) -> None:
    """Found by segments where there are many; few values, so that ties cross segments."""
    generator = torch.Generator().manual_seed(4)
    for num_values in (2, 40, 600, 10**6):
        logits_NV = torch.randint(num_values, (20, num_columns), generator=generator).float()
        logits_NV[:3, 5 * num_columns // 7 :] = -torch.inf
        expected_NK = logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :7]
        values_NK, ids_NK = topk(logits_NV, 7, tp_group=None)
        assert torch.equal(ids_NK, expected_NK)
        assert torch.equal(values_NK, logits_NV.gather(-1, expected_NK).double())


def test_gather_at(results: list[dict[str, Any]]) -> None:
    expected_NK = build_logits().gather(-1, results[0]["ids"])
    assert torch.equal(results[0]["gathered"], expected_NK)
    assert torch.equal(results[0]["gathered_row"], expected_NK[:, 0])


def test_sampling_inverts_the_cdf(results: list[dict[str, Any]]) -> None:
    sampled_N = results[0]["sampled"]
    masses_NV = results[0]["logprobs"].exp()
    assert (masses_NV.gather(-1, sampled_N[:, None]) > 0).all()
    cdf_NV = masses_NV.double().cumsum(-1)
    target_N1 = build_uniforms()[:, None] * cdf_NV[:, -1:]
    expected_N = torch.searchsorted(cdf_NV, target_N1, right=True)[:, 0]
    expected_N[5] = 9
    assert torch.equal(sampled_N, expected_N)
    assert sampled_N[3:5].tolist() == [NUM_VALID - 1, 90]
    assert torch.equal(sampled_N, results[0]["scaled"])


def test_sampling_a_softmax(results: list[dict[str, Any]]) -> None:
    ids_N, log_normalizer_N = results[0]["softmax"]
    assert torch.equal(ids_N, results[0]["sampled"])
    logits_NV = build_logits()[:, :NUM_VALID].double()
    torch.testing.assert_close(log_normalizer_N, logits_NV.logsumexp(dim=-1), rtol=1e-6, atol=1e-6)


def test_sampling_a_broken_softmax_gives_some_id() -> None:
    logits_NU = torch.zeros(4, 300)
    logits_NU[0, 7], logits_NU[1, 7], logits_NU[2] = torch.nan, torch.inf, -torch.inf
    ids_N, log_normalizer_N = sample_softmax(logits_NU, torch.rand(4), tp_group=None)
    assert ((ids_N >= 0) & (ids_N < 300)).all()
    assert log_normalizer_N.isfinite().tolist() == [False, False, False, True]


def test_sampling_from_many_columns(results: list[dict[str, Any]]) -> None:
    weights_NV = build_wide_weights().double()
    cdf_NV = weights_NV.cumsum(-1)
    target_N1 = build_uniforms()[:, None] * cdf_NV[:, -1:]
    expected_N = torch.searchsorted(cdf_NV, target_N1, right=True)[:, 0]
    expected_N[5] = 1299  # a uniform of 1 takes the last id with any mass
    assert torch.equal(results[0]["wide"], expected_N)
    assert (weights_NV.gather(-1, expected_N[:, None]) > 0).all()


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_zero_mass_is_never_sampled(uniform: float) -> None:
    weights_NU = torch.tensor([[0, 0, 1e-30, 0, 2e-30, 0, 0]])
    sampled_N = sample_inverse_cdf(weights_NU, torch.tensor([uniform]), tp_group=None)
    assert sampled_N.item() == (4 if uniform > 0.34 else 2)


def test_sampling_accumulates_in_float64() -> None:
    weights_NU = torch.full((1, 128), 1e-9)
    weights_NU[0, 0] = 1
    sampled_N = sample_inverse_cdf(weights_NU, torch.tensor([1 - 2**-53]).double(), tp_group=None)
    assert sampled_N.item() == 127


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_weights_without_a_finite_sum_are_refused(weight: float) -> None:
    weights_NU = torch.tensor([[1.0, 1.0], [weight, 0.0]])
    with pytest.raises(ValueError, match="row 1"):
        sample_inverse_cdf(weights_NU, torch.rand(2), tp_group=None)


def test_mask_invalid_upcasts_and_leaves_its_input() -> None:
    logits_NU = torch.full((2, 6), float("nan"), dtype=torch.bfloat16)
    logits_NU[:, :4] = 1
    masked_NU = mask_invalid(logits_NU, 4, None)
    assert masked_NU.dtype == torch.float32
    assert masked_NU[0].tolist() == [1, 1, 1, 1, -torch.inf, -torch.inf]
    assert logits_NU[:, 4:].isnan().all()
    for num_valid in (0, 7):
        with pytest.raises(ValueError, match="num_valid"):
            mask_invalid(logits_NU, num_valid, None)


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "NaN"), (torch.inf, r"\+inf"), (-torch.inf, "no id")]
)
def test_bad_rows_are_named(value: float, message: str) -> None:
    logits_NU = torch.zeros(3, 5)
    logits_NU[2] = value
    with pytest.raises(ValueError, match=f"{message}.* row 2"):
        softmax(logits_NU, tp_group=None)


def test_topk_refuses_more_than_exist() -> None:
    logits_NU = torch.zeros(3, 5)
    logits_NU[1, 3:] = -torch.inf
    for k in (0, 4, 6):
        with pytest.raises(ValueError, match="top_k"):
            topk(logits_NU, k, tp_group=None)


def test_width_guard_sees_a_gathered_vocabulary() -> None:
    shard_NU = torch.zeros(4, 8)
    with ShardWidthGuard(shard_NU):
        shard_NU.exp()
    for widen in (lambda x: torch.cat((x, x), -1), lambda x: torch.stack((x, x))):
        with pytest.raises(AssertionError, match="exceeds the shard"), ShardWidthGuard(shard_NU):
            widen(shard_NU)
