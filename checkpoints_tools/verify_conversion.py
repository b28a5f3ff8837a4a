"""Check that Megatron computes what transformers computes.

    python -m checkpoints_tools.verify_conversion HF_FOLDER [--megatron CHECKPOINT] [--json FILE]
    torchrun --nproc-per-node=4 -m checkpoints_tools.verify_conversion HF_FOLDER
        --tensor-parallel 2 --pipeline-parallel 2

transformers continues each prompt greedily in fp32; then Megatron reads the prompt with its
continuation. In fp32 it holds when no logit differs by more than --max-logit-difference. In bf16
transformers reads it in bf16, too, and it holds when Megatron's error against transformers in fp32
is at most --max-error-ratio times that of transformers' own bf16: the largest error of a prompt,
and the root mean square (RMS). In both, Megatron must choose each token of the continuation that
rounding can't decide: those by whose logit the second best is behind by more than
--max-logit-difference or, in bf16, than transformers' own largest error. KL(transformers in fp32 ||
Megatron) is reported for each position. bf16 hides small faults; what fp32 shows is the conversion.

HF_FOLDER is given to transformers. Megatron reads the same folder or, with --megatron, a converted
checkpoint. Exit status: 0 it holds, 1 it does not, 2 something is wrong with the input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_tools.command import PARALLEL_OPTIONS, parse_count, run
from trb_megatron.batch import Microbatch
from trb_megatron.config.options import ParallelConfig
from trb_megatron.distributed.layout import ParallelLayout, initialize, say, shutdown
from trb_megatron.huggingface.config import (
    HFModelConfig,
    check_layout,
    padded_vocab_size,
    read_hf_config,
)
from trb_megatron.huggingface.model_tensors import is_left_out, open_model
from trb_megatron.huggingface.tensors import CheckpointError
from trb_megatron.huggingface.tokenizer import check_tokenizer_fits

if TYPE_CHECKING:
    from trb_megatron.models.gpt import HiddenStateGPTModel

DEFAULT_PROMPTS = (
    "The capital of France is",
    "12 + 30 = ",
    "def fibonacci(n):\n",
    "Once upon a time, there was a",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_DIFFERENCE = 1e-3
# SmolLM2 135M, whole and with 20 of 30 layers, 14 prompts: 0.6 to 1.3 were measured on CPUs.
DEFAULT_RATIO = 2.0


@dataclass(frozen=True)
class Errors:
    """Of logits against those of transformers in fp32, in absolute value, over one prompt."""

    max: float
    rms: float

    @classmethod
    def of(cls, logits_TV: Tensor, expected_TV: Tensor) -> Errors:
        """Those of logits."""
        difference_TV = (logits_TV - expected_TV).abs()
        return cls(difference_TV.max().item(), difference_TV.square().mean().sqrt().item())


@dataclass(frozen=True)
class Comparison:
    """Megatron against transformers on one prompt and transformers' continuation of it.

    Attributes:
        num_tokens: of prompt and continuation, each a compared position.
        num_decided: tokens of the continuation that rounding can't decide.
        greedy_agreement: how many of these Megatron chooses, too.
        errors: of Megatron's logits.
        limits: the largest errors that hold.
        kl: KL(transformers in fp32 || Megatron) at each position, in nats.
    """

    prompt: str
    num_tokens: int
    num_decided: int
    greedy_agreement: int
    errors: Errors
    limits: Errors
    kl: list[float]

    @property
    def holds(self) -> bool:
        """Whether rounding explains what differs; NaN never holds."""
        return (
            self.greedy_agreement == self.num_decided
            and self.errors.max <= self.limits.max
            and self.errors.rms <= self.limits.rms
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.verify_conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="HF checkpoint folder")
    parser.add_argument("--megatron", type=Path, help="converted checkpoint that Megatron reads")
    parser.add_argument("--tensor-parallel", type=parse_count, default=1, metavar="N")
    parser.add_argument("--pipeline-parallel", type=parse_count, default=1, metavar="N")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--prompts", type=Path, help="text file with one prompt on each line")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N")
    parser.add_argument(
        "--max-logit-difference",
        type=float,
        help=f"in fp32: largest difference that holds (default: {DEFAULT_DIFFERENCE})",
    )
    parser.add_argument(
        "--max-error-ratio",
        type=float,
        help="in bf16: largest error that holds, in those of transformers' own bf16 (default: "
        f"{DEFAULT_RATIO:g})",
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the input, say what would be compared"
    )
    run(verify, parser.parse_args(arguments))


def verify(options: argparse.Namespace) -> None:
    """Compare as the parsed options say; exits with 1 when it does not hold.

    Raises:
        ValueError, OSError: a checkpoint, layout, option or prompt file that cannot be used.
    """
    limit = read_limit(options)
    if options.new_tokens < 0:
        raise ValueError(f"--new-tokens {options.new_tokens}: must not be negative")
    layout = initialize(
        ParallelConfig(
            tensor_model_parallel_size=options.tensor_parallel,
            pipeline_model_parallel_size=options.pipeline_parallel,
        )
    )
    if dist.get_world_size() != layout.tp_size * layout.pp_size:
        raise ValueError(
            f"{dist.get_world_size()} processes for one model over {layout.tp_size} x "
            f"{layout.pp_size}: start as many as --tensor-parallel times --pipeline-parallel"
        )
    config = read_hf_config(options.source)
    check_layout([config], layout.tp_size, layout.pp_size, PARALLEL_OPTIONS)
    _, warnings = open_model(config)  # with --megatron, too: transformers reads this folder
    for warning in warnings:
        say(f"warning: {warning}")
    tokenizer = check_tokenizer_fits(options.source, config.vocab_size)
    prompts = read_prompts(options.prompts)
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, prompt_ids)) + options.new_tokens
    if not all(prompt_ids) or longest > config.max_positions:
        raise ValueError(
            f"a prompt needs at least one token and, with --new-tokens {options.new_tokens}, at "
            f"most the {config.max_positions} positions of the model; the longest takes {longest}"
        )
    if options.dry_run:
        say(f"would compare {config.family} on {len(prompts)} prompts, {longest} tokens long")
        return

    model = load_megatron(options, config, layout)
    # The leader alone holds transformers' models; the other ranks need nothing but its tokens.
    reference, rounded = None, None
    if layout.is_leader:
        reference = load_transformers(options.source, torch.float32)
    if layout.is_leader and options.precision == "bf16":
        rounded = load_transformers(options.source, torch.bfloat16)
    leader = dist.get_world_size() - layout.tp_size  # the last stage's first tensor-parallel rank
    comparisons = []
    for prompt, token_ids in zip(prompts, prompt_ids, strict=True):
        tokens = continue_greedily(reference, token_ids, options.new_tokens) if reference else []
        shared = [tokens]
        dist.broadcast_object_list(shared, src=leader)
        logits_TV = forward_logits(model, shared[0], layout)
        if reference is not None:
            assert logits_TV is not None
            expected_TV = transformers_logits(reference, tokens)
            rounding = Errors(limit, limit)
            if rounded is not None:
                rounding = Errors.of(transformers_logits(rounded, tokens), expected_TV)
            ratio = 1.0 if rounded is None else limit
            ours_TV = logits_TV[:, : config.vocab_size].cpu()
            text = Continued(prompt, tokens, options.new_tokens)
            comparisons.append(compare(text, ours_TV, expected_TV, rounding, ratio))
    holds = layout.is_leader and report(comparisons, limit, options)
    verdict = [holds]
    dist.broadcast_object_list(verdict, src=leader)
    shutdown()
    if not verdict[0]:
        sys.exit(1)


def read_limit(options: argparse.Namespace) -> float:
    """The largest error that holds: of a logit in fp32, in those of transformers' own in bf16."""
    difference, ratio = options.max_logit_difference, options.max_error_ratio
    if options.precision == "fp32":
        unused, limit = ratio, DEFAULT_DIFFERENCE if difference is None else difference
    else:
        unused, limit = difference, DEFAULT_RATIO if ratio is None else ratio
    if unused is not None:
        raise ValueError(
            "--max-logit-difference is for --precision fp32, --max-error-ratio for bf16"
        )
    return float(limit)


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The prompts of a file, one on each line that isn't empty, or the default ones."""
    if file is None:
        return DEFAULT_PROMPTS
    prompts = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line)
    if not prompts:
        raise ValueError(f"{file}: no prompts; write one on each line")
    return prompts


def load_megatron(
    options: argparse.Namespace, config: HFModelConfig, layout: ParallelLayout
) -> HiddenStateGPTModel:
    """The Megatron model on this rank, with the weights that the options name."""
    from trb_megatron.checkpoint.megatron_tensors import open_megatron_checkpoint
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import fill_model, load_hf_weights

    vocab_size = padded_vocab_size([config.vocab_size], layout.tp_size)
    dtype = DTYPES[options.precision]
    model = build_model(config, layout, vocab_size=vocab_size, dtype=dtype).eval()
    if options.megatron is None:
        load_hf_weights(model, config, layout)
    else:
        tensors, _ = open_megatron_checkpoint(options.megatron)
        fill_model(model, config, layout, tensors)
    return model


def load_transformers(source: Path, dtype: torch.dtype) -> Any:
    """transformers' model of the HF folder, greedy; none of the folder's code runs.

    Raises:
        CheckpointError: transformers cannot load it, or begins with other weights than the folder's
            or leaves some of them out that would change the logits.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    safe = {"local_files_only": True, "trust_remote_code": False}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = load(source, dtype=dtype, output_loading_info=True, **safe)
    except Exception as error:  # of any type, from a broken file on
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: transformers cannot load it: {reason}") from error
    left_out = {name for name in found["unexpected_keys"] if not is_left_out(name)}
    for what, names in (("misses", found["missing_keys"]), ("leaves out", left_out)):
        if names:
            raise CheckpointError(f"{source}: transformers {what} {', '.join(sorted(names))}")
    model.eval()
    # Without the folder's own stop ids, penalties and sampling.
    model.generation_config = GenerationConfig()
    return model


@torch.no_grad()
def transformers_logits(reference: Any, tokens: list[int]) -> Tensor:
    """Logits [T, V] of a sequence, in fp32."""
    return reference(torch.tensor([tokens])).logits[0].float()


def continue_greedily(reference: Any, prompt_ids: list[int], num_new: int) -> list[int]:
    """The prompt and transformers' greedy continuation, which goes on after a stop id."""
    if num_new == 0:
        return prompt_ids
    tokens_1T = torch.tensor([prompt_ids])
    continued_1T = reference.generate(
        tokens_1T, attention_mask=torch.ones_like(tokens_1T), max_new_tokens=num_new
    )
    return list(continued_1T[0].tolist())


class Continued(NamedTuple):
    """A prompt, and its tokens together with those of its continuation."""

    prompt: str
    tokens: list[int]
    num_new: int


def compare(
    text: Continued, ours_TV: Tensor, expected_TV: Tensor, rounding: Errors, ratio: float
) -> Comparison:
    """Compare the logits of both at every position.

    Args:
        rounding: errors that are explained by it.
        ratio: how many times as much still holds.
    """
    before = slice(-text.num_new - 1, -1)  # positions whose next token is new
    best_T2, ids_T2 = expected_TV[before].topk(2)
    is_decided_T = best_T2[:, 0] - best_T2[:, 1] > rounding.max
    chosen_T = ours_TV[before].argmax(-1)
    log_p_TV, log_q_TV = expected_TV.log_softmax(-1), ours_TV.log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    return Comparison(
        prompt=text.prompt,
        num_tokens=len(text.tokens),
        num_decided=int(is_decided_T.sum()),
        greedy_agreement=int((is_decided_T & (chosen_T == ids_T2[:, 0])).sum()),
        errors=Errors.of(ours_TV, expected_TV),
        limits=Errors(ratio * rounding.max, ratio * rounding.rms),
        kl=kl_T.tolist(),
    )


def report(comparisons: list[Comparison], limit: float, options: argparse.Namespace) -> bool:
    """Print the table, write the JSON file; whether it holds."""
    holds = all(c.holds for c in comparisons)
    print(
        f"{'greedy':>9} {'max error':>10} {'limit':>9} {'RMS error':>10} {'limit':>9} "
        f"{'max KL':>10}  prompt"
    )
    for c in comparisons:
        print(
            f"{c.greedy_agreement:>4}/{c.num_decided:<4} {c.errors.max:>10.2e} "
            f"{c.limits.max:>9.1e} {c.errors.rms:>10.2e} {c.limits.rms:>9.1e} "
            f"{max(c.kl):>10.2e}  {c.prompt!r}"
        )
    how = f"{limit:g} on a logit"
    if options.precision == "bf16":
        how = f"{limit:g} times the error of transformers' own bf16"
    print(f"{'holds' if holds else 'DOES NOT HOLD'} (limit: {how})")
    if options.json is not None:
        figures = {
            "holds": holds,
            "limit": limit,
            "precision": options.precision,
            "tensor_parallel": options.tensor_parallel,
            "pipeline_parallel": options.pipeline_parallel,
            "prompts": [asdict(c) for c in comparisons],
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return holds


def forward_logits(
    model: HiddenStateGPTModel, token_ids: Sequence[int], layout: ParallelLayout
) -> Tensor | None:
    """Logits [T, padded vocabulary] of one sequence in fp32, on the last stage; None elsewhere.

    Collective over the model replica; an all-gather over the tensor-parallel group joins the
    vocabulary shards, so that a rank holds the whole: for checks only.
    """
    from trb_megatron.models.forward import forward_hidden

    num_tokens, multiple = len(token_ids), model.token_multiple
    padded = -(-num_tokens // multiple) * multiple
    tokens_T = torch.zeros(padded, dtype=torch.long, device=layout.device)
    tokens_T[:num_tokens] = torch.tensor(token_ids)
    positions_T = torch.arange(padded, device=layout.device)
    microbatch = Microbatch(
        tokens_T,
        positions_T,
        tokens_T,
        positions_T < num_tokens,
        cu_lengths=(0, padded),
        sources=((0, 0),),
    )
    hidden = forward_hidden(model, [microbatch])
    if not layout.is_last_stage:
        return None
    shard_NU = model.project(hidden[0]).detach().contiguous()
    shards = [torch.empty_like(shard_NU) for _ in range(layout.tp_size)]
    dist.all_gather(shards, shard_NU, group=layout.tp_group)
    return torch.cat(shards, dim=-1).float()


if __name__ == "__main__":
    main()
