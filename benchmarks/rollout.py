"""Time of TRB rollouts: speculative against token by token, in one run.

    torchrun --standalone --nproc-per-node 1 -m benchmarks.rollout     (2: tensor parallel)

Random models: student 4 layers x 128, teacher 8 layers x --teacher-width, vocabulary 4,096, logits
scaled so that the budget is active almost everywhere (see the column KL/ε). Ratios are those
of medians over repetitions that alternate between the variants, because the machine is shared.
"Vanilla" is what plain on-policy distillation does to collect its data: student rollouts, then one
batched forward pass of the teacher over them. On one rank the student's rollouts alone stand beside
`generate` of transformers with the same weights. With --student and --teacher, folders of real
models take the place of the random ones, and questions that of random prompts. "Predicted" are the
teacher calls per token that the measured acceptance lets expect (`drafting.expected_tokens`).
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_models import random_qwen3
from benchmarks.same_tokens import build_requests
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.config.options import ParallelConfig, RolloutConfig
from trb_megatron.distributed.layout import ParallelLayout, initialize, is_rank_zero, shutdown
from trb_megatron.huggingface.config import read_hf_config

VOCAB_SIZE = 4096
PROMPT_TOKENS = 16


def main() -> None:
    """Measure every number of sequences that was asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 8, 32, 128])
    parser.add_argument("--drafts", nargs="+", default=["0", "2", "4", "8", "auto"])
    parser.add_argument("--student", type=Path, help="folder of a Hugging Face model")
    parser.add_argument("--teacher", type=Path, help="likewise, with the same vocabulary")
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--teacher-width", type=int, default=256)
    parser.add_argument("--kl-budget", type=float, default=0.01)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--page-tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    layout = initialize(ParallelConfig(tensor_model_parallel_size=num_ranks))
    models, baseline = load_models(options, layout)
    rows = [
        f"| {num_sequences} | {row}"
        for num_sequences in options.sequences
        for row in measure(Variants(models, layout, num_sequences, options), baseline, options)
    ]
    if is_rank_zero():
        print(
            f"\nTP {layout.tp_size}, teacher {options.teacher or options.teacher_width}, budget "
            f"{options.kl_budget}, {options.response_tokens} tokens, "
            f"median of {options.repetitions}\n"
        )
        print(
            "| sequences | variant | seconds | speed-up | teacher calls/token | predicted | "
            "acceptance | KL/ε |"
        )
        print("|-|-|-|-|-|-|-|-|")
        print("\n".join(rows))
    shutdown()


def load_models(
    options: argparse.Namespace, layout: ParallelLayout
) -> tuple[list[torch.nn.Module], Any]:
    """Student and teacher; and the student as a model of transformers, where it is a random one on
    one rank."""
    if options.student is not None:
        return [load_model(folder, layout) for folder in (options.student, options.teacher)], None
    with tempfile.TemporaryDirectory() as own_folder:
        shared = [own_folder]
        torch.distributed.broadcast_object_list(shared, src=0)
        folder = Path(shared[0])
        shapes: dict[str, dict[str, int]] = {
            "student": {"layers": 4, "width": 128, "seed": 0},
            "teacher": {"layers": 8, "width": options.teacher_width, "seed": 1},
        }
        models = [build_random_model(folder / n, layout, **shape) for n, shape in shapes.items()]
        baseline = load_baseline(folder / "student") if layout.tp_size == 1 else None
        torch.distributed.barrier()  # before rank 0 removes the folder
    return models, baseline


def build_random_model(
    folder: Path, layout: ParallelLayout, *, layers: int, width: int, seed: int
) -> torch.nn.Module:
    """A random Qwen3 model, saved by rank 0 of transformers' class and loaded as ours."""
    model: Any = random_qwen3(
        vocab_size=VOCAB_SIZE,
        layers=layers,
        width=width,
        seed=seed,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model.save_pretrained(folder)  # on rank 0, says transformers
    torch.distributed.barrier()
    return load_model(folder, layout)


def load_model(folder: Path, layout: ParallelLayout) -> torch.nn.Module:
    """A Hugging Face model as ours, fp32."""
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights

    hf_config = read_hf_config(folder)
    ours = build_model(hf_config, layout, vocab_size=hf_config.vocab_size, dtype=torch.float32)
    load_hf_weights(ours, hf_config, layout)
    return ours.eval().requires_grad_(False)


def load_baseline(folder: Path) -> Any:
    """The student as a model of transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


class Variants:
    """The ways to collect rollouts that are compared, for one number of sequences.

    No token ends a response, so that all variants do the same work.
    """

    def __init__(
        self,
        models: list[torch.nn.Module],
        layout: ParallelLayout,
        num_sequences: int,
        options: argparse.Namespace,
    ) -> None:
        from trb_megatron.behavior.policies import BlendPolicy, StudentPolicy
        from trb_megatron.rollout.sequences import Request, ResponseSpec

        self._models = models
        self._layout = layout
        self._options = options
        self._spec = ResponseSpec(
            max_response_tokens=options.response_tokens, stop_ids=(), seed=0, step=0
        )
        vocab_size = VOCAB_SIZE
        if options.student is not None:
            vocab_size = read_hf_config(options.student).vocab_size
        shared: Any = {"temperature": 1.0, "num_valid": vocab_size, "tp_group": layout.tp_group}
        alignment = StopAlignment((vocab_size - 1,), (vocab_size - 1,))
        self._blend = BlendPolicy(kl_budget=options.kl_budget, alignment=alignment, **shared)
        self._student_alone = StudentPolicy(alignment=None, **shared)
        torch.manual_seed(7)
        self._prompts = torch.randint(0, VOCAB_SIZE - 1, (num_sequences, PROMPT_TOKENS)).tolist()
        if options.student is not None:
            questions = [request.prompt_ids for request in build_requests(options.student)]
            self._prompts = [questions[i % len(questions)] for i in range(num_sequences)]
        self._requests = [Request(i, 0, tuple(ids)) for i, ids in enumerate(self._prompts)]
        self._engines = {drafts: self._build_engine(drafts) for drafts in options.drafts}

    def _build_engine(self, drafts: str) -> Any:
        from trb_megatron.rollout.engine import RolloutEngine

        config = RolloutConfig(
            max_sequences=len(self._requests),
            draft_tokens="auto" if drafts == "auto" else int(drafts),
            page_tokens=self._options.page_tokens,
        )
        engine = RolloutEngine(*self._models, self._layout, config)
        if drafts == "auto":
            started = time.perf_counter()
            engine.draft_costs = engine.measure_draft_costs(
                self._blend, self._spec, len(self._requests)
            )
            if is_rank_zero():
                print(f"auto: {time.perf_counter() - started:.1f} s; {engine.draft_costs}")
        return engine

    def blended(self) -> dict[str, Callable[[], Any]]:
        """Rollouts of the blend by draft length; the first is the yardstick."""
        return {
            "token by token" if drafts == "0" else f"{drafts} drafts": partial(
                engine.generate, self._requests, self._blend, self._spec
            )
            for drafts, engine in self._engines.items()
        }

    def student_alone(self) -> list:
        """Rollouts of the student."""
        engine = self._engines[self._options.drafts[0]]
        return engine.generate(self._requests, self._student_alone, self._spec)

    def vanilla(self) -> list:
        """Rollouts of the student, and a batched pass of the teacher over them."""
        from trb_megatron.batch import build_microbatches
        from trb_megatron.models.forward import forward_hidden

        rollouts, (_, teacher) = self.student_alone(), self._models
        microbatches = build_microbatches(rollouts, 8192, self._layout.device)
        for hidden_NH in forward_hidden(teacher, microbatches):
            teacher.project(hidden_NH)
        return rollouts

    @torch.no_grad()
    def transformers(self, baseline: Any) -> list:
        """Rollouts of the student by `generate` of transformers."""
        prompt_ids = torch.tensor(self._prompts)
        count = self._options.response_tokens
        return baseline.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
        )


def measure(variants: Variants, baseline: Any, options: argparse.Namespace) -> list[str]:
    """Table rows of one number of sequences, without that number."""
    blended = variants.blended()
    everything = {**blended, "vanilla": variants.vanilla}
    if baseline is not None:
        everything["student alone"] = variants.student_alone
        everything["transformers"] = partial(variants.transformers, baseline)
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    rollouts = {name: variant() for name, variant in everything.items()}  # warm up
    for _ in range(options.repetitions):
        for name, variant in everything.items():
            torch.distributed.barrier()
            started = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - started)
    tokens = [[r.response_ids for r in rollouts[name]] for name in blended]
    assert all(other == tokens[0] for other in tokens), "drafts changed the tokens"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    yardstick = medians[next(iter(blended))]
    details = {name: describe(rollouts[name], name, options) for name in blended}
    return [
        f"{name} | {median:.2f} | {yardstick / median:.2f} | {details.get(name, '- | - | - | -')} |"
        for name, median in medians.items()
    ]


def describe(rollouts: list, name: str, options: argparse.Namespace) -> str:
    """Teacher calls per token, as counted and as predicted, acceptance, and use of the budget."""
    from trb_megatron.rollout.drafting import expected_tokens

    num_tokens = sum(len(r.response_ids) for r in rollouts)
    calls = sum(r.teacher_calls for r in rollouts) / num_tokens
    accepted = float(torch.cat([r.record.accepted for r in rollouts]).double().mean())
    active = torch.cat([r.record.kl_student for r in rollouts]).mean() / options.kl_budget
    predicted = "-"
    if name != "auto drafts":
        num_drafts = 0 if name == "token by token" else int(name.split()[0])
        predicted = f"{1 / expected_tokens(accepted, num_drafts + 1):.3f}"
    return f"{calls:.3f} | {predicted} | {accepted:.3f} | {active:.3f}"


if __name__ == "__main__":
    main()
