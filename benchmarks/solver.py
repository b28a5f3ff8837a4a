"""Time and memory of the blend solver: `solve_behavior` against bisection with the same kernel.

    python benchmarks/solver.py [--rows 256] [--columns 151936]
    torchrun --standalone --nproc-per-node 2 benchmarks/solver.py     (vocabulary-parallel)

Random models in fp32 on one thread per rank; the budget is active in every row that is counted as
open. Bisection halves the bracket of β until the KL is within the solver's own tolerance of the
budget, and drops rows as they get there; the ratio is that of medians over repetitions that
alternate between the two, because the machine is shared. Memory is the peak of the process (of the
CUDA allocator on a GPU) during one `solve_behavior`, above what the process held before, in units
of one input shard.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from trb_megatron.behavior.moments import Block, OpenRows, Pair, evaluate, gather_pair
from trb_megatron.behavior.solver import Behavior, solve_behavior

RELATIVE_TOLERANCE = 1e-5
"""The solver's: a row's KL ends between (1 - 2 * this) * budget and the budget."""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=151_936)
    parser.add_argument("--kl-budget", type=float, default=0.01)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    group = None
    if num_ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        group = dist.group.WORLD
    student_NU, teacher_NU = build_logits(options.rows, options.columns // num_ranks)

    def solve() -> Behavior:
        return solve_behavior(student_NU, teacher_NU, options.kl_budget, tp_group=group)

    def bisect() -> tuple[Tensor, Tensor]:
        return solve_by_bisection(student_NU, teacher_NU, options.kl_budget, group)

    seconds: dict[str, list[float]] = {"solver": [], "bisection": []}
    peak = measure_peak(solve)
    for _ in range(options.repetitions):
        for name, function in (("solver", solve), ("bisection", bisect)):
            seconds[name].append(measure_seconds(function, group))
    behavior, (blend_coef_N, passes_N) = solve(), bisect()
    difference = (behavior.blend_coef / blend_coef_N - 1).abs().max().item()
    passes = {"solver": count_passes(solve, options.rows), "bisection": passes_N}
    if group is None or dist.get_rank() == 0:
        shard = student_NU.nbytes
        num_open = int((passes["solver"] > 1).sum())
        print(
            f"\n{options.rows} rows x {options.columns} columns on {num_ranks} ranks, budget "
            f"{options.kl_budget}, {num_open} rows open, medians of {options.repetitions}; "
            f"β differs by at most {difference:.1e} of itself\n"
        )
        print("| | seconds | speed-up | passes, mean | passes, most | peak memory / input shard |")
        print("|-|-|-|-|-|-|")
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, median in medians.items():
            speed_up = medians["bisection"] / median
            memory = f"{peak / shard:.2f}" if name == "solver" else "-"
            mean, most = passes[name].double().mean(), passes[name].max()
            print(f"| {name} | {median:.3f} | {speed_up:.1f} | {mean:.2f} | {most} | {memory} |")
    if group is not None:
        dist.destroy_process_group()


def build_logits(num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A shard of both models: peaked, and different enough for the budget to matter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(int(os.environ.get("RANK", "0")))
    student_NU = torch.randn(num_rows, width, generator=generator, device=device).mul_(3)
    teacher_NU = torch.randn(num_rows, width, generator=generator, device=device).mul_(1.5)
    return student_NU, teacher_NU.add_(student_NU)


def solve_by_bisection(
    student_NU: Tensor, teacher_NU: Tensor, kl_budget: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """β and the passes over the logits of each row, both [N], to the solver's tolerance."""
    pair = gather_pair(student_NU, teacher_NU, group)
    is_teacher_N = pair.kl_teacher_student_N <= kl_budget
    low_N, high_N = is_teacher_N.double(), torch.ones_like(pair.center_N)
    passes_N = torch.ones_like(is_teacher_N, dtype=torch.long)
    rows_M = (~is_teacher_N).nonzero()[:, 0]
    while len(rows_M) > 0:
        middle_M = ((low_N[rows_M] + high_N[rows_M]) / 2).float().double()
        open_rows = OpenRows(rows_M, rows_M[:0])
        found = evaluate(open_rows, middle_M[:, None], pair, group)
        passes_N[rows_M] += 1
        kl_M = found.kl[:, 0]
        low_N[rows_M] = torch.where(kl_M <= kl_budget, middle_M, low_N[rows_M])
        high_N[rows_M] = torch.where(kl_M <= kl_budget, high_N[rows_M], middle_M)
        is_close_M = (kl_M <= kl_budget) & (kl_M >= kl_budget * (1 - 2 * RELATIVE_TOLERANCE))
        is_narrow_M = high_N[rows_M] - low_N[rows_M] <= 1.2e-7 * high_N[rows_M]
        rows_M = rows_M[~(is_close_M | is_narrow_M)]
    return low_N.float(), passes_N


def count_passes(solve: Callable[[], Behavior], num_rows: int) -> Tensor:
    """How often the logits of each row are read, [N]."""
    passes_N = torch.ones(num_rows, dtype=torch.long)
    load = Block.load

    def count(pair: Pair, rows_M: Tensor, dtype: torch.dtype) -> Block:
        passes_N[rows_M.cpu()] += 1
        return load(pair, rows_M, dtype)

    Block.load = count  # type: ignore[method-assign]
    try:
        solve()
    finally:
        Block.load = load  # type: ignore[method-assign]
    return passes_N


def measure_seconds(function: Callable[[], object], group: dist.ProcessGroup | None) -> float:
    """Wall time of one call, all ranks starting together."""
    if group is not None:
        dist.barrier()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_peak(function: Callable[[], object]) -> int:
    """Bytes that a call holds at its peak beyond what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = read_status("VmRSS")
    function()
    return read_status("VmHWM") - before


def read_status(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
