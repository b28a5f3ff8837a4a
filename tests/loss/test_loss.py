"""Losses against dense autograd in float64: values, gradients across TP, options, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.ranks import ShardWidthGuard, vocab_shard
from tests.reference import dense_loss
from trb_megatron.distributed.vocab_parallel import all_gather
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions

NUM_ROWS, NUM_VALID = 6, 203
DISTILLATION = [name for name in LOSSES if name != "cross_entropy"]
OPTIONS: dict[str, Any] = {"top_k": 5, "temperature": 0.8, "jsd_weight": 0.3, "veto_coef": 0.4}
REMOVED = [7, 110]


def build_logits(scale: float = 3.0, noise: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student_NV = scale * torch.randn(NUM_ROWS, NUM_VALID, generator=generator)
    teacher_NV = student_NV + noise * torch.randn(NUM_ROWS, NUM_VALID, generator=generator)
    return student_NV, teacher_NV


def sampled_ids() -> Tensor:
    return torch.tensor([0, 3, 101, 102, 150, NUM_VALID - 1])


def weights() -> Tensor:
    """Row weights: a mask and a normalizer, as the trainer applies them."""
    return torch.tensor([0.5, 0.0, 2.0, 1.0, -1.0, 3.0])


def measure(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
    """Per name: values and the gathered gradient, with removed ids and garbage padding."""
    group = current_group()
    student_NV, teacher_NV = (logits_NV.to(dtype) for logits_NV in build_logits())
    student_NV[:, REMOVED], teacher_NV[:, REMOVED] = -torch.inf, -torch.inf
    results = {}
    for name in LOSSES:
        student_NU = vocab_shard(student_NV, group).requires_grad_()
        teacher_NU = vocab_shard(teacher_NV, group)
        loss = LOSSES[name](
            student_NU,
            None if name == "cross_entropy" else teacher_NU,
            tp_group=group,
            num_valid=NUM_VALID,
            sampled_ids=sampled_ids(),
            **OPTIONS,
        )
        (loss.per_token * weights()).sum().backward()
        assert student_NU.grad is not None and student_NU.grad.dtype == dtype
        grad_NV = all_gather(student_NU.grad, group).transpose(0, 1).flatten(1)
        results[name] = (loss.per_token.detach(), grad_NV)
    return results


def guard_widths() -> None:
    """All losses forward and backward, with no tensor beyond the shard. top_k * R < U."""
    group = current_group()
    student_NV, teacher_NV = build_logits()
    for name in LOSSES:
        student_NU = vocab_shard(student_NV, group, fill=0.0).requires_grad_()
        teacher_NU = vocab_shard(teacher_NV, group, fill=0.0)
        with ShardWidthGuard(student_NU):
            loss = LOSSES[name](
                student_NU, teacher_NU, tp_group=group, sampled_ids=sampled_ids(), **OPTIONS
            )
            loss.per_token.sum().backward()


def collect_errors() -> list[str]:
    """Messages of bad input in the last shard, which every rank must raise."""
    group = current_group()
    messages = []
    for model, value in ((0, torch.nan), (1, torch.inf), (1, -torch.inf)):
        logits = build_logits()
        logits[model][4, NUM_VALID - 1] = value
        shards = [vocab_shard(logits_NV, group) for logits_NV in logits]
        with pytest.raises(ValueError) as error:
            LOSSES["reverse_kl_topk"](*shards, tp_group=group, num_valid=NUM_VALID)
        messages.append(str(error.value))
    return messages


def run_checks() -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    group = current_group()
    if group is not None and group.size() == 2:
        guard_widths()
    return measure(), collect_errors()


@pytest.fixture(scope="module", params=TP_SIZES)
def results(request: pytest.FixtureRequest) -> list[tuple[Any, list[str]]]:
    return on_ranks(run_checks, request.param)


def expected(name: str) -> tuple[Tensor, Tensor]:
    student_NV, teacher_NV = build_logits()
    # A finite logit whose mass underflows: autograd through -inf would be NaN.
    student_NV[:, REMOVED], teacher_NV[:, REMOVED] = -1e9, -1e9
    value_N, grad_NV = dense_loss(
        name, student_NV, teacher_NV, LossOptions(**OPTIONS), sampled_ids=sampled_ids()
    )
    return value_N, grad_NV * weights()[:, None]


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name: str, results: list[tuple[Any, list[str]]]) -> None:
    expected_N, expected_NV = expected(name)
    for found, _ in results:
        value_N, grad_NV = found[name]
        torch.testing.assert_close(value_N.double(), expected_N, rtol=1e-6, atol=1e-6)
        difference = (grad_NV[:, :NUM_VALID] - expected_NV).abs().max()
        assert difference <= 5e-6 * expected_NV.abs().max()
        assert (grad_NV[:, NUM_VALID:] == 0).all()
        assert (grad_NV[:, REMOVED] == 0).all()


def test_errors_are_raised_on_every_rank(results: list[tuple[Any, list[str]]]) -> None:
    for _, messages in results:
        assert messages == [
            "student logits hold a NaN in row 4",
            "teacher logits hold a +inf in row 4",
            "logits are -inf in one model only in row 4",
        ]


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_keeps_the_dtype_of_the_logits(name: str) -> None:
    _, grad_NV = measure(torch.bfloat16)[name]
    # bf16 rounds each logit to 2^-9 relative: only the gist of the gradient survives.
    expected_NV = expected(name)[1]
    difference = (grad_NV[:, :NUM_VALID] - expected_NV).abs().max()
    assert difference <= 0.1 * expected_NV.abs().max()


@pytest.mark.parametrize("name", DISTILLATION)
@pytest.mark.parametrize(("scale", "noise"), [(30, 40), (5, 0.01), (5, 1e-3)])
def test_extreme_and_close_models(name: str, scale: float, noise: float) -> None:
    student_NV, teacher_NV = build_logits(scale, noise)
    logits_NV = student_NV.clone().requires_grad_()
    loss = LOSSES[name](logits_NV, teacher_NV, sampled_ids=sampled_ids(), veto_coef=0.4)
    (grad_NV,) = torch.autograd.grad(loss.per_token.sum(), logits_NV)
    options = LossOptions(top_k=16, temperature=1.0, jsd_weight=0.5, veto_coef=0.4)
    expected_N, expected_NV = dense_loss(name, student_NV, teacher_NV, options, sampled_ids())
    torch.testing.assert_close(loss.per_token.detach().double(), expected_N, rtol=1e-6, atol=1e-6)
    # The sampled ratio carries the rounding of the normalizers, 1e-7 of a ratio of 1e-3, and the
    # JSD saturates at scale 30: its gradient is a small difference of fp32 numbers near 1.
    tolerance = {"reverse_kl_sampled": 2e-4, "jsd": 2e-4 if scale == 30 else 5e-6}.get(name, 5e-6)
    assert (grad_NV - expected_NV).abs().max() <= tolerance * expected_NV.abs().max()


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_student_that_is_its_teacher_has_no_loss(name: str) -> None:
    student_NV, _ = build_logits()
    logits_NV = student_NV.clone().requires_grad_()
    loss = LOSSES[name](logits_NV, student_NV, sampled_ids=sampled_ids())
    (grad_NV,) = torch.autograd.grad(loss.per_token.sum(), logits_NV)
    assert (loss.per_token == 0).all()
    assert (grad_NV == 0).all()


def test_topk_keeps_only_k_columns_for_backward() -> None:
    student_NV, teacher_NV = build_logits()
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        LOSSES["reverse_kl_topk"](student_NV.requires_grad_(), teacher_NV, top_k=5)
    assert [tensor.shape for tensor in saved] == [(NUM_ROWS, 5), (NUM_ROWS, 5)]


def test_metrics() -> None:
    student_NV, teacher_NV = build_logits()
    metrics = LOSSES["reverse_kl_topk"](student_NV, teacher_NV, top_k=9).metrics
    support_NK = student_NV.topk(9).indices
    for model, logits_NV in (("student", student_NV), ("teacher", teacher_NV)):
        logp_NV = logits_NV.double().log_softmax(-1)
        mass_N = logp_NV.exp().gather(-1, support_NK).sum(-1)
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        torch.testing.assert_close(metrics[f"{model}_topk_mass"], mass_N.float())
        torch.testing.assert_close(metrics[f"{model}_entropy"], entropy_N.float())
    teachers_NK = teacher_NV.topk(9).indices
    pairs = zip(support_NK.tolist(), teachers_NK.tolist(), strict=True)
    expected_N = torch.tensor([len({*ours} & {*theirs}) / 9 for ours, theirs in pairs])
    assert 0 < expected_N.max() < 1
    torch.testing.assert_close(metrics["topk_overlap"], expected_N)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 11, "num_valid": 10},
        {"top_k": NUM_VALID + 1},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"jsd_weight": 1.0},
        {"veto_coef": -0.1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LOSSES["reverse_kl_topk"](*build_logits(), **options)


@pytest.mark.parametrize("name", ["reverse_kl_sampled", "cross_entropy"])
def test_sampled_ids_must_exist(name: str) -> None:
    with pytest.raises(ValueError, match="needs sampled_ids"):
        LOSSES[name](*build_logits())
    for bad_id in (-100, NUM_VALID - 1, NUM_VALID):
        ids_N = sampled_ids().clamp(max=100)
        ids_N[2] = bad_id
        with pytest.raises(ValueError, match="does not exist in row 2"):
            LOSSES[name](*build_logits(), num_valid=NUM_VALID - 1, sampled_ids=ids_N)
