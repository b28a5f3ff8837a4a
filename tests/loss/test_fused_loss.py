"""The loss from hidden states against dense float64: values, both gradients, chunks, layouts.

Shapes as in `trb_megatron.loss.fused`; the gradient of the weight is gathered over shards.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.local_ranks import TP_SIZES, current_group, on_ranks
from tests.loss.cases import (
    ALIGNMENTS,
    CHUNKS,
    DEFAULTS,
    NUM_TOKENS,
    NUM_VALID,
    ONE_TOKEN,
    OPTIONS,
    SOME_TOKENS,
    Result,
    build_layers,
    evaluate,
    sampled_ids,
    settings_of,
    token_weights,
    workspace_bytes,
)
from tests.ranks import vocab_shard
from tests.reference import dense_loss
from tests.test_golden import GOLDEN_NAMES, load
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.loss.fused import FusedLossOutput, fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer


def expected(name: str, layers: list[OutputLayer], alignment: StopAlignment | None) -> Result:
    """By definition, in float64."""
    hidden_NH, weight_VH = (tensor.double().requires_grad_() for tensor in layers[0])
    student_NV = hidden_NH @ weight_VH[:NUM_VALID].T / OPTIONS.temperature
    teacher_NV = layers[1].hidden_NH.double() @ layers[1].weight_UH[:NUM_VALID].double().T
    teacher_NV = teacher_NV / OPTIONS.temperature
    if alignment is not None:
        student_NV = merge(student_NV, alignment.student_ids, alignment)
        teacher_NV = merge(teacher_NV, alignment.teacher_ids, alignment)
    value_N, grad_NV = dense_loss(
        name,
        student_NV,
        teacher_NV,
        dataclasses.replace(OPTIONS, temperature=1.0),
        sampled_ids=sampled_ids(),
    )
    weights_N = token_weights().double()
    grads = torch.autograd.grad(student_NV, (hidden_NH, weight_VH), grad_NV * weights_N[:, None])
    return Result((value_N * weights_N).sum(), value_N, *grads, {})


def merge(logits_NV: Tensor, own_ids: tuple[int, ...], alignment: StopAlignment) -> Tensor:
    """Stop ids merged; removed ones get a finite logit whose mass underflows."""
    columns = list(logits_NV.unbind(-1))
    merged_N = logits_NV[:, list(own_ids)].logsumexp(-1)
    for removed_id in alignment.removed_ids:
        columns[removed_id] = torch.full_like(merged_N, -1e9)
    columns[alignment.stop_id] = merged_N
    return torch.stack(columns, dim=-1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest element."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def evaluate_all() -> dict[tuple[str, int], list[Result]]:
    """Every loss with and without alignment, at each chunk size.

    At "some tokens" the gradient of the weight goes into a buffer, else through autograd.
    """
    group = current_group()
    return {
        (name, number): [
            evaluate(
                settings_of(name, alignment=alignment, workspace_bytes=workspace_bytes(chunk)),
                build_layers(),
                ids_N=sampled_ids(),
                weights_N=token_weights(),
                into_buffer=chunk == SOME_TOKENS,
            )
            for chunk in CHUNKS[1 if group is None else group.size()]
        ]
        for name in LOSSES
        for number, alignment in enumerate(ALIGNMENTS)
    }


def evaluate_golden() -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Values and gradient of the golden logits as hidden states, under a weight that passes them
    on."""
    group = current_group()
    cases, golden = load("losses")
    results = {}
    for case in cases:
        i, num_valid = case["case"], case["vocab"]
        weight_UV = vocab_shard(torch.eye(num_valid), group, fill=0.0).T.contiguous()
        student_NV, teacher_NV = (golden[f"{i}_{model}_logits"] for model in ("student", "teacher"))
        teacher = OutputLayer(teacher_NV, weight_UV)
        for golden_name in case["losses"]:
            name, options = GOLDEN_NAMES[golden_name]
            settings = settings_of(
                name,
                options=LossOptions(**DEFAULTS | {"top_k": case["top_k"]} | options),
                workspace_bytes=3 * 10 * len(weight_UV),
                num_valid=num_valid,
            )
            student = OutputLayer(student_NV.clone().requires_grad_(), weight_UV)
            output = fused_loss(settings, student, teacher)
            output.loss_sum.backward()
            results[i, golden_name] = output.per_token, student.hidden_NH.grad
    return results


def measure() -> tuple[Any, Any]:
    return evaluate_all(), evaluate_golden()


@pytest.fixture(scope="module", params=TP_SIZES, ids=lambda tp: f"tp{tp}")
def results(request: pytest.FixtureRequest) -> list[tuple[Any, Any]]:
    return on_ranks(measure, request.param)


@pytest.mark.parametrize("number", range(len(ALIGNMENTS)), ids=("plain", "aligned"))
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str, number: int, results: list[tuple[Any, Any]]) -> None:
    exact = expected(name, build_layers(), ALIGNMENTS[number])
    for found in results[0][0][name, number]:
        torch.testing.assert_close(
            found.per_token_N.double(), exact.per_token_N, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(found.loss_sum.double(), exact.loss_sum, rtol=1e-5, atol=1e-5)
        assert relative_error(found.grad_hidden_NH, exact.grad_hidden_NH) <= 5e-6
        assert relative_error(found.grad_weight_VH, exact.grad_weight_VH) <= 5e-6
        assert (found.grad_weight_VH[NUM_VALID:] == 0).all()


def test_golden_vectors(results: list[tuple[Any, Any]]) -> None:
    cases, golden = load("losses")
    for case in cases:
        i = case["case"]
        for name in case["losses"]:
            found_N, found_NV = results[0][1][i, name]
            value_N, grad_NV = golden[f"{i}_{name}_value"], golden[f"{i}_{name}_grad"]
            assert ((found_N - value_N).abs() <= 1e-5).all(), (i, name)
            difference = (found_NV - grad_NV).abs().max()
            assert difference <= 5e-6 * grad_NV.abs().max(), (i, name)


def test_all_ranks_agree_bit_for_bit(results: list[tuple[Any, Any]]) -> None:
    for other, _ in results[1:]:
        for key, result in results[0][0].items():
            for one, two in zip(tree_leaves(result), tree_leaves(other[key]), strict=True):
                assert torch.equal(one, two), key


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_change_nothing(name: str, results: list[tuple[Any, Any]]) -> None:
    *chunks, whole = results[0][0][name, 1]
    for chunked in chunks:
        # The weights have both signs: the sum may be smaller than what it sums.
        assert abs(chunked.loss_sum - whole.loss_sum) <= 1e-6 * whole.per_token_N.abs().sum()
        for one, other in zip(tree_leaves(whole[1:]), tree_leaves(chunked[1:]), strict=True):
            # Matrix products of other shapes add in another order.
            assert relative_error(other, one.double()) <= 2e-6


@pytest.mark.parametrize("name", LOSSES)
def test_token_of_weight_zero_contributes_nothing(name: str) -> None:
    settings = settings_of(name, alignment=ALIGNMENTS[1])

    def run(layers: list[OutputLayer], weights_N: Tensor) -> Result:
        return evaluate(settings, layers, ids_N=sampled_ids(), weights_N=weights_N)

    plain = run(build_layers(), token_weights())
    layers = build_layers()
    layers[0].hidden_NH[5] *= -3
    layers[1].hidden_NH[1] += 5
    changed = run(layers, token_weights())
    assert (changed.grad_hidden_NH[[1, 5]] == 0).all()
    assert torch.equal(changed.loss_sum, plain.loss_sum)
    assert torch.equal(changed.grad_hidden_NH, plain.grad_hidden_NH)
    assert torch.equal(changed.grad_weight_VH, plain.grad_weight_VH)
    with_token_N = torch.where(torch.arange(NUM_TOKENS) == 5, 1.0, token_weights())
    assert (run(build_layers(), with_token_N).grad_hidden_NH[5] != 0).any()


@pytest.mark.parametrize("into_buffer", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision(name: str, into_buffer: bool) -> None:
    layers = build_layers(torch.bfloat16)
    found = evaluate(
        settings_of(name, alignment=ALIGNMENTS[1], workspace_bytes=workspace_bytes(SOME_TOKENS)),
        layers,
        ids_N=sampled_ids(),
        weights_N=token_weights(),
        into_buffer=into_buffer,
    )
    exact = expected(name, layers, ALIGNMENTS[1])
    assert found.grad_hidden_NH.dtype == torch.bfloat16
    # bf16 rounds logits of up to 10 by 2^-5, and with them log-ratios, at worst.
    tolerance = 2**-4
    assert relative_error(found.per_token_N, exact.per_token_N) <= tolerance
    assert relative_error(found.grad_hidden_NH, exact.grad_hidden_NH) <= tolerance
    assert relative_error(found.grad_weight_VH, exact.grad_weight_VH) <= tolerance


def test_metrics_are_those_of_the_logits() -> None:
    layers = build_layers()
    logits = [hidden_NH @ weight_VH.T for hidden_NH, weight_VH in layers]
    for name in ("reverse_kl_topk", "jsd"):
        found = evaluate(settings_of(name, workspace_bytes=workspace_bytes(SOME_TOKENS)), layers)
        options = {"top_k": OPTIONS.top_k, "temperature": OPTIONS.temperature}
        exact = LOSSES[name](*logits, num_valid=NUM_VALID, **options).metrics
        assert found.metrics.keys() == exact.keys() and len(exact) == 5
        for key, value_N in exact.items():
            torch.testing.assert_close(found.metrics[key], value_N, rtol=1e-5, atol=1e-5)


def unbounded(name: str) -> FusedLossSettings:
    """On one rank, every column valid."""
    return settings_of(name, num_valid=None)


def test_upstream_gradient() -> None:
    layers = build_layers()
    hidden_NH, weight_VH = (tensor.clone().requires_grad_() for tensor in layers[0])
    buffer_VH = torch.zeros_like(weight_VH)

    def run(weight_grad_UH: Tensor | None) -> FusedLossOutput:
        student = OutputLayer(hidden_NH, weight_VH)
        return fused_loss(unbounded("jsd"), student, layers[1], weight_grad_UH=weight_grad_UH)

    once = torch.autograd.grad(run(None).loss_sum, (hidden_NH, weight_VH))
    thrice = torch.autograd.grad(3 * run(None).loss_sum, (hidden_NH, weight_VH))
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one)
    for _ in range(2):
        run(buffer_VH).loss_sum.backward()
    torch.testing.assert_close(buffer_VH, 2 * once[1])
    with pytest.raises(RuntimeError, match="upstream gradient of 1, not 3"):
        (3 * run(buffer_VH).loss_sum).backward()


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    layers = build_layers()
    buffer_VH = torch.zeros_like(layers[0].weight_UH)
    settings = unbounded("reverse_kl_full")
    with torch.no_grad():
        output = fused_loss(settings, *layers, weight_grad_UH=buffer_VH)
    assert not output.loss_sum.requires_grad and (buffer_VH == 0).all()
    student = OutputLayer(layers[0].hidden_NH.requires_grad_(), layers[0].weight_UH)
    fused_loss(settings, student, layers[1]).loss_sum.backward()
    assert student.hidden_NH.grad is not None and student.weight_UH.grad is None


def test_errors_name_the_tokens() -> None:
    layers = build_layers()
    with pytest.raises(ValueError, match="needs a teacher"):
        fused_loss(unbounded("jsd"), layers[0], None)
    layers[1].hidden_NH[6] = torch.nan
    settings = dataclasses.replace(unbounded("jsd"), workspace_bytes=workspace_bytes(ONE_TOKEN))
    with pytest.raises(ValueError, match=r"teacher logits hold a NaN in row 6"):
        fused_loss(settings, *layers)
