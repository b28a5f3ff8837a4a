"""Memory of the full-vocabulary reverse KL with gradients: chunk by chunk against all at once.

    OMP_NUM_THREADS=2 python benchmarks/loss_memory.py

Each case runs in a process of its own. What is reported is the measured peak of the process (on a
GPU: of the allocator) above what is there anyway: hidden states and output weights of both models
and the gradient buffer of the student's weight. It includes the gradient of the hidden states.
"""

import argparse
import multiprocessing
import time

import psutil
import torch

from trb_megatron.loss.fused import fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer

MB = 10**6


def main() -> None:
    """Measure all cases and print one table, with an extrapolation of the dense way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 8192])
    parser.add_argument("--dense-tokens", type=int, nargs=2, default=[512, 1024])
    parser.add_argument("--loss", default="reverse_kl_full", choices=list(LOSSES))
    parser.add_argument("--workspace-mb", type=int, default=512)
    options = parser.parse_args()
    print(
        f"{options.loss}, vocabulary {options.vocab_size:,}, workspace {options.workspace_mb} MB\n"
    )
    print("| hidden | way | tokens | MB above inputs, weights, gradient | of which ∂hidden | s |")
    print("|-|-|-|-|-|-|")
    for hidden_size in options.hidden_sizes:
        dense = {}
        for way, counts in (("dense", options.dense_tokens), ("chunked", options.tokens)):
            for num_tokens in counts:
                extra_mb, seconds = in_own_process(way, num_tokens, hidden_size, options)
                print(row(hidden_size, way, num_tokens, f"{extra_mb:,.0f}", f"{seconds:.0f}"))
                if way == "dense":
                    dense[num_tokens] = extra_mb
        (few, few_mb), (many, many_mb) = sorted(dense.items())
        most = max(options.tokens)
        line_mb = many_mb + (most - many) * (many_mb - few_mb) / (many - few)
        print(row(hidden_size, "dense, extrapolated", most, f"{line_mb:,.0f}", "-"))


def row(hidden_size: int, way: str, num_tokens: int, extra_mb: str, seconds: str) -> str:
    """A line of the table."""
    grad_mb = 4 * num_tokens * hidden_size / MB
    return f"| {hidden_size:,} | {way} | {num_tokens:,} | {extra_mb} | {grad_mb:.0f} | {seconds} |"


def in_own_process(
    way: str, num_tokens: int, hidden_size: int, options: argparse.Namespace
) -> tuple[float, float]:
    """`measure` where no earlier case has raised the peak."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, way, num_tokens, hidden_size, options))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _send(pipe, *args) -> None:
    pipe.send(measure(*args))


def measure(
    way: str, num_tokens: int, hidden_size: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Peak in MB above inputs, weights and weight gradient, and seconds of one evaluation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = [torch.randn(num_tokens, hidden_size, device=device) for _ in range(2)]
    weights = [torch.randn(options.vocab_size, hidden_size, device=device) for _ in range(2)]
    for weight in weights:
        weight.mul_(hidden_size**-0.5)
    hidden[0].requires_grad_()
    grad = torch.zeros_like(weights[0]).fill_(0.0)
    workspace_bytes = options.workspace_mb * MB
    _evaluate(
        way, [h[:8].detach().requires_grad_() for h in hidden], weights, grad, options.loss, 1
    )
    before = _reset_peak(device)
    start = time.perf_counter()
    _evaluate(way, hidden, weights, grad, options.loss, workspace_bytes)
    extra = _peak(device) - before
    return extra / MB, time.perf_counter() - start


def _evaluate(
    way: str,
    hidden: list[torch.Tensor],
    weights: list[torch.Tensor],
    grad: torch.Tensor,
    name: str,
    workspace_bytes: int,
) -> None:
    if way == "chunked":
        output = fused_loss(
            FusedLossSettings(
                loss=LOSSES[name],
                options=LossOptions(top_k=16, temperature=1.0, jsd_weight=0.5, veto_coef=0.0),
                workspace_bytes=workspace_bytes,
            ),
            OutputLayer(hidden[0], weights[0]),
            OutputLayer(hidden[1], weights[1]),
            weight_grad_UH=grad,
        )
        output.loss_sum.backward()
        return
    weight = weights[0].detach().requires_grad_()
    weight.grad = grad
    student_logits, teacher_logits = hidden[0] @ weight.T, hidden[1].detach() @ weights[1].T
    LOSSES[name](student_logits, teacher_logits).per_token.sum().backward()


def _reset_peak(device: str) -> int:
    """Bytes in use now, from which the peak is counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak becomes the present resident set
    return psutil.Process().memory_info().rss


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
