"""Time of a loss with gradients against the matrix products that it cannot avoid, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loss_time.py

A loss on the whole vocabulary needs four: logits of student and teacher, the gradients of hidden
states and weight. One on the top-k needs the first two. The products run on all tokens at once,
into memory that is there already. Repetitions alternate between both, because the machine may be
shared; ratios are those of medians. On a CPU (fp32) seconds are those that the process computed:
with one thread, other processes disturb them less than the clock on the wall. On a GPU (bf16) they
are those of the device.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from trb_megatron.loss.fused import fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer


def main() -> None:
    """Measure every loss and hidden size and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--losses", nargs="+", default=["reverse_kl_full", "reverse_kl_topk"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workspace-mb", type=int, default=512)
    options = parser.parse_args()
    print(
        f"{options.tokens:,} tokens, vocabulary {options.vocab_size:,}, workspace "
        f"{options.workspace_mb} MB, {torch.get_num_threads()} threads, "
        f"medians of {options.repetitions}\n"
    )
    print("| hidden | loss | products | s of the products | s of the loss | ratio |")
    print("|-|-|-|-|-|-|")
    for hidden_size in options.hidden_sizes:
        for name in options.losses:
            num_products, products_s, loss_s = measure(name, hidden_size, options)
            print(
                f"| {hidden_size:,} | {name} | {num_products} | {products_s:.3f} | {loss_s:.3f} "
                f"| {loss_s / products_s:.2f} |",
                flush=True,
            )


def measure(name: str, hidden_size: int, options: argparse.Namespace) -> tuple[int, float, float]:
    """Number of unavoidable products, and median seconds of them and of the loss."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)

    def random(num_rows: int) -> torch.Tensor:
        return torch.randn(num_rows, hidden_size, device=device).to(dtype)

    student, teacher = (
        OutputLayer(random(options.tokens), random(options.vocab_size) * hidden_size**-0.5)
        for _ in range(2)
    )
    student.hidden_NH.requires_grad_()
    weight_grad_UH = torch.zeros_like(student.weight_UH, dtype=torch.float32)
    settings = FusedLossSettings(
        loss=LOSSES[name],
        options=LossOptions(top_k=16, temperature=1.0, jsd_weight=0.5, veto_coef=0.0),
        workspace_bytes=options.workspace_mb * 10**6,
    )
    sampled_ids = torch.zeros(options.tokens, dtype=torch.long, device=device)

    def run_loss() -> None:
        output = fused_loss(
            settings, student, teacher, sampled_ids=sampled_ids, weight_grad_UH=weight_grad_UH
        )
        torch.autograd.grad(output.loss_sum, student.hidden_NH)

    products = unavoidable_products(name, student, teacher)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repetition in range(options.repetitions + 1):
        for run, found in zip((lambda: [p() for p in products], run_loss), seconds, strict=True):
            elapsed = stopwatch(run)
            if repetition > 0:
                found.append(elapsed)
    return len(products), *(statistics.median(found) for found in seconds)


def unavoidable_products(
    name: str, student: OutputLayer, teacher: OutputLayer
) -> list[Callable[[], torch.Tensor]]:
    """The bare matrix products behind a loss, each into memory of its own."""
    hidden_NH, weight_UH = (tensor.detach() for tensor in student)
    logits_NU = hidden_NH.new_empty(len(hidden_NH), len(weight_UH))
    products = [lambda: torch.mm(hidden_NH, weight_UH.T, out=logits_NU)]
    if LOSSES[name].needs_teacher:
        products.append(lambda: torch.mm(teacher.hidden_NH, teacher.weight_UH.T, out=logits_NU))
    if not LOSSES[name].on_support:
        grad_NH, grad_UH = torch.empty_like(hidden_NH), torch.empty_like(weight_UH)
        products.append(lambda: torch.mm(logits_NU, weight_UH, out=grad_NH))
        products.append(lambda: torch.mm(logits_NU.T, hidden_NH, out=grad_UH))
    return products


def stopwatch(run: Callable[[], object]) -> float:
    """Seconds of one call: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
