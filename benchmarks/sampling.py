"""Time of drawing a token: keyed Gumbel-max on two levels against softmax and `torch.multinomial`.

    python -m benchmarks.sampling      (from the root of the repository)

One thread, or a GPU where there is one. Medians of repetitions that alternate.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trb_megatron.behavior.sampling import sample_softmax
from trb_megatron.uniforms import Purpose, position_keys, rollout_key

SIZES = ((1, 4096), (32, 4096), (288, 4096), (8, 49_152), (64, 151_936))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=50)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| rows x ids | Gumbel-max, us | softmax and multinomial, us | ratio |\n|-|-|-|-|")
    for num_rows, num_ids in SIZES:
        key_N = position_keys(rollout_key(0, 0, torch.arange(num_rows), 0), torch.tensor(0))
        logits_NV, key_N = 2 * torch.randn(num_rows, num_ids, device=device), key_N.to(device)

        def draw(logits_NV: Tensor = logits_NV, key_N: Tensor = key_N) -> Tensor:
            return sample_softmax(logits_NV, key_N, Purpose.DRAFT, tp_group=None).token_ids

        def draw_plainly(logits_NV: Tensor = logits_NV) -> Tensor:
            return torch.multinomial(logits_NV.softmax(-1), 1)

        ours, plain = measure((draw, draw_plainly), repetitions)
        print(f"| {num_rows} x {num_ids:,} | {ours:,.0f} | {plain:,.0f} | {ours / plain:.2f} |")


def measure(variants: tuple[Callable[[], Tensor], ...], repetitions: int) -> list[float]:
    """Microseconds of each variant, medians."""
    times: list[list[float]] = [[] for _ in variants]
    with torch.inference_mode():
        for _ in range(1 + repetitions):
            for variant, of_variant in zip(variants, times, strict=True):
                started = time.perf_counter()
                variant()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                of_variant.append(time.perf_counter() - started)
    return [1e6 * statistics.median(of_variant[1:]) for of_variant in times]


if __name__ == "__main__":
    main()
