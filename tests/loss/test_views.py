"""What the losses read of a model: against dense float64, at TP 1 to 16."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.test_vocab_parallel import NUM_ROWS, NUM_VALID, build_logits
from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import vocab_shard
from trb_megatron.distributed.vocab_parallel import all_gather, mask_invalid
from trb_megatron.loss.views import view_model

TOP_K = 12


def support_ids() -> Tensor:
    """Ids that another model might have on top, [N, K]: one of each shard, and more."""
    return (torch.arange(NUM_ROWS)[:, None] + torch.arange(1, 97, 8)) % 54 + 6


def measure() -> dict[str, Tensor]:
    """Everything that a view tells, gathered where it is sharded."""
    group = current_group()
    logits_NU = mask_invalid(vocab_shard(build_logits(), group), NUM_VALID, group)
    own = view_model("student", logits_NU, TOP_K, group)
    other = view_model("teacher", logits_NU, TOP_K, group, support_ids())
    probs_NV = all_gather(own.probs_NU(), group).transpose(0, 1).flatten(1)
    return {
        "entropy": own.summary.entropy_N,
        "ids": own.summary.topk_ids_NK,
        "support": own.summary.support_NK,
        "other_ids": other.summary.topk_ids_NK,
        "other_support": other.summary.support_NK,
        "logprobs": own.logprobs_at(support_ids()[:, 0]),
        "probs": probs_NV[:, :NUM_VALID],
    }


@pytest.fixture(scope="module", params=TP_SIZES)
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(measure, request.param)


def test_ranks_agree_bit_for_bit(results: list[dict[str, Tensor]]) -> None:
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


def test_entropy_and_probabilities(results: list[dict[str, Tensor]]) -> None:
    expected_NV = build_logits().double().log_softmax(-1)
    masses_NV = expected_NV.exp()
    entropy_N = -(masses_NV * expected_NV.nan_to_num(neginf=0)).sum(-1)
    assert results[0]["entropy"].dtype == torch.float64
    torch.testing.assert_close(results[0]["entropy"], entropy_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0]["probs"].double(), masses_NV, rtol=1e-6, atol=1e-7)


def test_support(results: list[dict[str, Tensor]]) -> None:
    found, expected_NV = results[0], build_logits().double().log_softmax(-1)
    ids_NK = build_logits().sort(dim=-1, descending=True, stable=True).indices[:, :TOP_K]
    for key, support_ids_NK in (("support", ids_NK), ("other_support", support_ids())):
        expected_NK = expected_NV.gather(-1, support_ids_NK)
        torch.testing.assert_close(found[key], expected_NK, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["ids"], ids_NK) and torch.equal(found["other_ids"], ids_NK)
    assert torch.equal(found["logprobs"], found["other_support"][:, 0])
