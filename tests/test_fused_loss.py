"""The loss from hidden states against dense float64: values, both gradients, chunks, layouts.

Shapes as in `trb_megatron.fused_loss`; the gradient of the weight is gathered over shards.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import run_distributed
from tests.reference import dense_loss
from tests.test_golden import GOLDEN_NAMES, load
from trb_megatron.fused_loss import FusedLossOutput, OutputLayer, fused_loss
from trb_megatron.loss import LOSSES, LossOptions
from trb_megatron.stop_alignment import StopAlignment
from trb_megatron.vocab_parallel import all_gather

NUM_TOKENS, NUM_VALID, NUM_ROWS, WIDTHS = 11, 203, 208, (24, 40)
OPTIONS = LossOptions(top_k=5, temperature=0.8, jsd_weight=0.3, veto_coef=0.4)
ALIGNMENTS = (None, StopAlignment((118, 2), (2, 9, 150)))
ONE_TOKEN, SOME_TOKENS, ALL_TOKENS = 1, 4 * NUM_ROWS * 10, 2**30
BUDGETS = (ONE_TOKEN, SOME_TOKENS, ALL_TOKENS)


class Result(NamedTuple):
    """What one call gives."""

    loss_sum: Tensor
    per_token_N: Tensor
    grad_hidden_NH: Tensor
    grad_weight_VH: Tensor
    metrics: dict[str, Tensor]


def build_layers(dtype: torch.dtype = torch.float32) -> list[OutputLayer]:
    """Whole output layers of student and teacher; rows from `NUM_VALID` on are garbage."""
    generator = torch.Generator().manual_seed(5)
    layers = []
    for width in WIDTHS:
        hidden_NH = torch.randn(NUM_TOKENS, width, generator=generator)
        weight_VH = 2 * torch.randn(NUM_ROWS, width, generator=generator) / width**0.5
        weight_VH[NUM_VALID:] = 1e3
        # Stop ids that are likely: their merge then matters.
        weight_VH[[2, 9, 118]] = 0.2 * hidden_NH[[0, 3, 6]]
        layers.append(OutputLayer(hidden_NH.to(dtype), weight_VH.to(dtype)))
    return layers


def token_weights() -> Tensor:
    """A mask and a normalizer, as one might apply them."""
    weights_N = torch.linspace(-1, 2, NUM_TOKENS)
    weights_N[[1, 7]] = 0.0
    return weights_N


def sampled_ids() -> Tensor:
    return torch.arange(NUM_TOKENS) * 18 + 3


def evaluate(
    name: str,
    layers: list[OutputLayer],
    alignment: StopAlignment | None,
    workspace_bytes: int = ALL_TOKENS,
    *,
    into_buffer: bool = False,
    options: LossOptions = OPTIONS,
    num_valid: int = NUM_VALID,
    weights_N: Tensor | None = None,
) -> Result:
    """The fused loss on this rank's shards, differentiated, its weight gradient gathered."""
    group = dist.group.WORLD if dist.is_initialized() else None
    num_ranks = 1 if group is None else dist.get_world_size()
    rank = 0 if group is None else dist.get_rank()
    shards = [weight_VH.chunk(num_ranks)[rank].clone() for _, weight_VH in layers]
    hidden_NH = layers[0].hidden_NH.clone().requires_grad_()
    weight_UH = shards[0].requires_grad_()
    buffer_UH = torch.zeros_like(weight_UH, dtype=torch.float32) if into_buffer else None
    output = fused_loss(
        name,
        OutputLayer(hidden_NH, weight_UH),
        None if name == "cross_entropy" else OutputLayer(layers[1].hidden_NH, shards[1]),
        options=options,
        tp_group=group,
        num_valid=num_valid,
        alignment=alignment,
        token_weights=weights_N,
        sampled_ids=sampled_ids() if num_valid == NUM_VALID else None,
        weight_grad_UH=buffer_UH,
        workspace_bytes=workspace_bytes,
    )
    output.loss_sum.backward()
    grad_UH = weight_UH.grad if buffer_UH is None else buffer_UH
    assert hidden_NH.grad is not None and grad_UH is not None
    assert buffer_UH is None or weight_UH.grad is None
    grad_VH = all_gather(grad_UH, group).flatten(0, 1)
    return Result(
        output.loss_sum.detach(), output.per_token, hidden_NH.grad, grad_VH, output.metrics
    )


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
        top_k=OPTIONS.top_k,
        jsd_weight=OPTIONS.jsd_weight,
        veto_coef=OPTIONS.veto_coef,
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


def evaluate_all() -> dict[tuple[str, int, int], Result]:
    """Every loss with and without alignment and at each chunk size.

    At the middle one the gradient of the weight goes into a buffer, else through autograd.
    """
    return {
        (name, number, budget): evaluate(
            name,
            build_layers(),
            alignment,
            budget,
            into_buffer=budget == SOME_TOKENS,
            weights_N=token_weights(),
        )
        for name in LOSSES
        for number, alignment in enumerate(ALIGNMENTS)
        for budget in BUDGETS
    }


def evaluate_golden() -> dict[tuple[int, str], Result]:
    """The golden logits as hidden states, under an output weight that passes them on."""
    cases, golden = load("losses")
    results = {}
    for case in cases:
        i, num_valid = case["case"], case["vocab"]
        weight_VV = torch.eye(-(-num_valid // 4) * 4, num_valid)  # rows that four ranks share
        layers = [
            OutputLayer(golden[f"{i}_{model}_logits"], weight_VV)
            for model in ("student", "teacher")
        ]
        for golden_name in case["losses"]:
            name, options = GOLDEN_NAMES[golden_name]
            results[i, golden_name] = evaluate(
                name,
                layers,
                None,
                3 * 10 * len(weight_VV),
                options=LossOptions(top_k=case["top_k"], **options),
                num_valid=num_valid,
            )
    return results


def measure() -> tuple[Any, Any]:
    return evaluate_all(), evaluate_golden()


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda tp: f"tp{tp}")
def results(request: pytest.FixtureRequest) -> list[tuple[Any, Any]]:
    return [measure()] if request.param == 1 else run_distributed(measure, request.param)


@pytest.mark.parametrize("number", range(len(ALIGNMENTS)), ids=("plain", "aligned"))
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str, number: int, results: list[tuple[Any, Any]]) -> None:
    exact = expected(name, build_layers(), ALIGNMENTS[number])
    for budget in BUDGETS:
        found = results[0][0][name, number, budget]
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
            found = results[0][1][i, name]
            value_N, grad_NV = golden[f"{i}_{name}_value"], golden[f"{i}_{name}_grad"]
            assert ((found.per_token_N - value_N).abs() <= 1e-5).all(), (i, name)
            difference = (found.grad_hidden_NH - grad_NV).abs().max()
            assert difference <= 5e-6 * grad_NV.abs().max(), (i, name)


def test_all_ranks_agree_bit_for_bit(results: list[tuple[Any, Any]]) -> None:
    for other, _ in results[1:]:
        for key, result in results[0][0].items():
            for one, two in zip(tree_leaves(result), tree_leaves(other[key]), strict=True):
                assert torch.equal(one, two), key


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_change_nothing(name: str, results: list[tuple[Any, Any]]) -> None:
    whole = results[0][0][name, 1, ALL_TOKENS]
    for budget in (ONE_TOKEN, SOME_TOKENS):
        chunked = results[0][0][name, 1, budget]
        # The weights have both signs: the sum may be smaller than what it sums.
        assert abs(chunked.loss_sum - whole.loss_sum) <= 1e-6 * whole.per_token_N.abs().sum()
        for one, other in zip(tree_leaves(whole[1:]), tree_leaves(chunked[1:]), strict=True):
            assert relative_error(other, one.double()) <= 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_token_of_weight_zero_contributes_nothing(name: str) -> None:
    plain = evaluate(name, build_layers(), ALIGNMENTS[1], weights_N=token_weights())
    layers = build_layers()
    layers[0].hidden_NH[7] *= -3
    layers[1].hidden_NH[1] += 5
    changed = evaluate(name, layers, ALIGNMENTS[1], weights_N=token_weights())
    assert (changed.grad_hidden_NH[[1, 7]] == 0).all()
    assert torch.equal(changed.loss_sum, plain.loss_sum)
    assert torch.equal(changed.grad_hidden_NH, plain.grad_hidden_NH)
    assert torch.equal(changed.grad_weight_VH, plain.grad_weight_VH)
    with_token_N = torch.where(torch.arange(NUM_TOKENS) == 7, 1.0, token_weights())
    counted = evaluate(name, build_layers(), ALIGNMENTS[1], weights_N=with_token_N)
    assert (counted.grad_hidden_NH[7] != 0).any()


@pytest.mark.parametrize("into_buffer", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision(name: str, into_buffer: bool) -> None:
    layers = build_layers(torch.bfloat16)
    found = evaluate(
        name, layers, ALIGNMENTS[1], SOME_TOKENS, into_buffer=into_buffer, weights_N=token_weights()
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
        found = evaluate(name, layers, None, SOME_TOKENS)
        options = {"top_k": OPTIONS.top_k, "temperature": OPTIONS.temperature}
        exact = LOSSES[name](*logits, num_valid=NUM_VALID, **options).metrics
        assert found.metrics.keys() == exact.keys() and len(exact) == 5
        for key, value_N in exact.items():
            torch.testing.assert_close(found.metrics[key], value_N, rtol=1e-5, atol=1e-5)


class OperationCounter(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products, self.largest = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_larger_than_a_chunk(name: str) -> None:
    num_tokens, num_rows, width = 64, 400, 4
    layers = [OutputLayer(torch.randn(num_tokens, width), torch.randn(num_rows, width))] * 2
    hidden_NH = layers[0].hidden_NH.requires_grad_()
    chunk, num_buffers = (8, 2) if LOSSES[name].needs_teacher else (16, 1)
    if LOSSES[name].on_support:
        chunk, num_buffers = 16, 1
    with OperationCounter() as counter:
        output = fused_loss(
            name,
            OutputLayer(hidden_NH, layers[0].weight_UH),
            None if name == "cross_entropy" else layers[1],
            options=LossOptions(),
            sampled_ids=torch.zeros(num_tokens, dtype=torch.long),
            weight_grad_UH=torch.zeros(num_rows, width),
            workspace_bytes=int(1.5 * 4 * num_rows * chunk * num_buffers),
        )
        output.loss_sum.backward()
    assert counter.largest == num_rows * chunk
    if LOSSES[name].on_support:  # two projections, and no product with a [tokens, U] gradient
        assert counter.num_products == 2 * num_tokens / chunk


def test_upstream_gradient() -> None:
    layers = build_layers()
    hidden_NH, weight_VH = (tensor.clone().requires_grad_() for tensor in layers[0])
    buffer_VH = torch.zeros_like(weight_VH)

    def run(weight_grad_UH: Tensor | None) -> FusedLossOutput:
        student = OutputLayer(hidden_NH, weight_VH)
        return fused_loss("jsd", student, layers[1], options=OPTIONS, weight_grad_UH=weight_grad_UH)

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
    with torch.no_grad():
        output = fused_loss("reverse_kl_full", *layers, options=OPTIONS, weight_grad_UH=buffer_VH)
    assert not output.loss_sum.requires_grad and (buffer_VH == 0).all()
    student = OutputLayer(layers[0].hidden_NH.requires_grad_(), layers[0].weight_UH)
    fused_loss("reverse_kl_full", student, layers[1], options=OPTIONS).loss_sum.backward()
    assert student.hidden_NH.grad is not None and student.weight_UH.grad is None


def test_errors_name_the_tokens() -> None:
    layers = build_layers()
    with pytest.raises(ValueError, match="jsd needs a teacher"):
        fused_loss("jsd", layers[0], None, options=OPTIONS)
    layers[1].hidden_NH[6] = torch.nan
    with pytest.raises(ValueError, match=r"teacher logits hold a NaN in row 6"):
        fused_loss("jsd", *layers, options=OPTIONS, workspace_bytes=ONE_TOKEN)
