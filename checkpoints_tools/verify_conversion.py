"""Check that Megatron computes what transformers computes.

    python -m checkpoints_tools.verify_conversion HF_FOLDER [--megatron CHECKPOINT] [--json FILE]
    torchrun --nproc-per-node=4 -m checkpoints_tools.verify_conversion HF_FOLDER
        --tensor-parallel 2 --pipeline-parallel 2

transformers continues each prompt greedily; then both read the prompt with its continuation. It
holds when Megatron would have chosen the same tokens, and no logit differs by more than
--max-logit-difference. KL(transformers || Megatron) is reported for each position. In bf16 rounding
may decide between tokens that are nearly equal; what fp32 shows is the conversion.

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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_tools.command import PARALLEL_OPTIONS, run
from trb_megatron.batch import Microbatch
from trb_megatron.config.options import ParallelConfig
from trb_megatron.distributed.layout import ParallelLayout, initialize, is_rank_zero, shutdown
from trb_megatron.huggingface.config import (
    HFModelConfig,
    check_layout,
    padded_vocab_size,
    read_hf_config,
)
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
# Half-precision logits of a few tens are spaced by 0.125; fp32 ones differ by the order of sums.
DEFAULT_DIFFERENCE = {"fp32": 1e-3, "bf16": 1.0}


@dataclass(frozen=True)
class Comparison:
    """Megatron against transformers on one prompt and transformers' continuation of it.

    Attributes:
        num_tokens: of prompt and continuation, each a compared position.
        greedy_agreement: how many tokens of the continuation Megatron chooses, too, up to the first
            that it doesn't.
        max_difference, mean_difference: of the logits, in absolute value.
        kl: KL(transformers || Megatron) at each position, in nats.
    """

    prompt: str
    num_tokens: int
    greedy_agreement: int
    max_difference: float
    mean_difference: float
    kl: list[float]


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.verify_conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="HF checkpoint folder")
    parser.add_argument("--megatron", type=Path, help="converted checkpoint that Megatron reads")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--prompts", type=Path, help="text file with one prompt on each line")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N")
    parser.add_argument(
        "--max-logit-difference",
        type=float,
        help="largest difference that holds (default: "
        + ", ".join(f"{value} in {name}" for name, value in DEFAULT_DIFFERENCE.items())
        + ")",
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the input, say what would be compared"
    )
    options = parser.parse_args(arguments)
    if options.max_logit_difference is None:
        options.max_logit_difference = DEFAULT_DIFFERENCE[options.precision]
    run(verify, options)


def verify(options: argparse.Namespace) -> None:
    """Compare as the parsed options say; exits with 1 when it does not hold.

    Raises:
        ValueError, OSError: a checkpoint, layout or prompt file that cannot be used.
    """
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
    tokenizer = check_tokenizer_fits(options.source, config.vocab_size)
    if options.new_tokens < 0:
        raise ValueError(f"--new-tokens {options.new_tokens}: must not be negative")
    prompts = read_prompts(options.prompts)
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, prompt_ids)) + options.new_tokens
    if not all(prompt_ids) or longest > config.max_positions:
        raise ValueError(
            f"a prompt needs at least one token and, with --new-tokens {options.new_tokens}, at "
            f"most the {config.max_positions} positions of the model; the longest takes {longest}"
        )
    if options.dry_run:
        if is_rank_zero():
            print(f"would compare {config.family} on {len(prompts)} prompts, {longest} tokens long")
        return

    model = load_megatron(options, config, layout)
    # The leader alone holds transformers' model; the other ranks need nothing but its tokens.
    reference = load_transformers(options) if layout.is_leader else None
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
            ours_TV = logits_TV[:, : config.vocab_size].cpu()
            comparisons.append(compare(prompt, tokens, options.new_tokens, ours_TV, expected_TV))
    holds = layout.is_leader and report(comparisons, options)
    verdict = [holds]
    dist.broadcast_object_list(verdict, src=leader)
    shutdown()
    if not verdict[0]:
        sys.exit(1)


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


def load_transformers(options: argparse.Namespace) -> Any:
    """transformers' model of the HF folder; none of the folder's code runs."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        options.source,
        dtype=DTYPES[options.precision],
        local_files_only=True,
        trust_remote_code=False,
    ).eval()


@torch.no_grad()
def transformers_logits(reference: Any, tokens: list[int]) -> Tensor:
    """Logits [T, V] of a sequence, in fp32."""
    return reference(torch.tensor([tokens])).logits[0].float()


def continue_greedily(reference: Any, prompt_ids: list[int], num_new: int) -> list[int]:
    """The prompt and transformers' greedy continuation, which goes on after a stop id."""
    tokens = list(prompt_ids)
    for _ in range(num_new):
        tokens.append(int(transformers_logits(reference, tokens)[-1].argmax()))
    return tokens


def compare(
    prompt: str, tokens: list[int], num_new: int, ours_TV: Tensor, expected_TV: Tensor
) -> Comparison:
    """Compare the logits of both at every position."""
    chosen = ours_TV[-num_new - 1 : -1].argmax(-1).tolist()
    agreement = 0
    while agreement < num_new and chosen[agreement] == tokens[agreement - num_new]:
        agreement += 1
    difference_TV = (ours_TV - expected_TV).abs()
    log_p_TV, log_q_TV = expected_TV.log_softmax(-1), ours_TV.log_softmax(-1)
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    return Comparison(
        prompt=prompt,
        num_tokens=len(tokens),
        greedy_agreement=agreement,
        max_difference=difference_TV.max().item(),
        mean_difference=difference_TV.mean().item(),
        kl=kl_T.tolist(),
    )


def report(comparisons: list[Comparison], options: argparse.Namespace) -> bool:
    """Print the table, write the JSON file; whether it holds."""
    limit = options.max_logit_difference
    # Written so that NaN doesn't hold.
    holds = all(
        c.greedy_agreement == options.new_tokens and c.max_difference <= limit for c in comparisons
    )
    print(f"{'greedy':>9} {'max diff':>10} {'mean diff':>10} {'max KL':>10}  prompt")
    for c in comparisons:
        print(
            f"{c.greedy_agreement:>4}/{options.new_tokens:<4} {c.max_difference:>10.2e} "
            f"{c.mean_difference:>10.2e} {max(c.kl):>10.2e}  {c.prompt!r}"
        )
    print(f"{'holds' if holds else 'DOES NOT HOLD'} (limit on a logit: {limit:g})")
    if options.json is not None:
        figures = {
            "holds": holds,
            "max_logit_difference": limit,
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
