"""How many tokens rounding changes: other cache slots, draft lengths and tensor parallelism.

    python -m benchmarks.same_tokens STUDENT TEACHER      (Hugging Face folders; fp32)

First, the logits of both models are taken at the same prefixes under each setting: one rollout is
recorded, and the engine is led along its tokens again. From the logits of two settings tokens are
drawn with --keys shared keys at each prefix. "TV" is the mean total variation between the
distributions that the two settings draw from (the student's, or the blend's), in float64.

Second, whole responses are generated under each setting with --seeds seeds. A response counts once,
at its first token that differs; the tokens behind it have another prefix.

Settings with TP > 1 run under torchrun, which this command starts.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BASE = "8 slots, no drafts, TP 1"
POLICIES = ("student alone", "TRB")
# What the questions are; any prompts do, as long as they lead to different prefixes.
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse.",
    "What is 17 times 23? Think step by step.",
    "Name three rivers of Africa and say where they end.",
    "Explain to a child how a bicycle stays upright.",
    "Translate 'Where is the station?' into French.",
    "List the ingredients of a good vegetable soup.",
    "Who was Ada Lovelace?",
)


class Setting(NamedTuple):
    """Options of a rollout that must not change its tokens."""

    max_sequences: int
    draft_tokens: int
    tp_size: int


class Drawn(NamedTuple):
    """What one setting gives."""

    logits: dict[int, tuple[Tensor, Tensor]]
    """Of student and teacher at each prefix, by its key, [V]; of one seed."""
    tokens: dict[tuple[str, int], list[tuple[int, ...]]]
    """Responses by policy and seed."""


def main() -> None:
    """Compare every setting with the base and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--tp", type=int, default=3, help="the other tensor-parallel size")
    parser.add_argument("--response-tokens", type=int, default=48)
    parser.add_argument("--kl-budget", type=float, default=0.01)
    parser.add_argument("--keys", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--setting", type=Path, help=argparse.SUPPRESS)  # for torchrun
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.setting is not None:
        run_setting(options)
        return
    settings = {
        BASE: Setting(8, 0, 1),
        "3 slots": Setting(3, 0, 1),
        "8 drafts": Setting(8, 8, 1),
        f"TP {options.tp}": Setting(8, 0, options.tp),
    }
    with tempfile.TemporaryDirectory() as folder:
        drawn = {}
        path: list[tuple[int, ...]] | None = None
        for name, setting in settings.items():
            drawn[name] = start_setting(setting, path, Path(folder))
            path = drawn[BASE].tokens["TRB", 0]
    num_prefixes = len(drawn[BASE].logits)
    print(f"\n{num_prefixes} prefixes x {options.keys} keys, {options.kl_budget} nats\n")
    print("| against the base | policy | mismatches | in a million | TV in a million | ratio |")
    print("|-|-|-|-|-|-|")
    others = [name for name in settings if name != BASE]
    num_valid = min(len(row) for rows in drawn[BASE].logits.values() for row in rows)
    for policy, rule in build_policies(options, num_valid).items():
        ids = {
            name: draw_at_prefixes(one, rule, num_valid, options.keys)
            for name, one in drawn.items()
        }
        for name in others:
            columns = compare_draws(ids[BASE], ids[name], drawn[BASE], drawn[name], rule, num_valid)
            print(f"| {name} | {policy} | {columns} |", flush=True)
    print("\n| against the base | policy | responses | tokens compared | first differences |")
    print("|-|-|-|-|-|")
    for name, policy in itertools.product(others, POLICIES):
        print(f"| {name} | {policy} | {compare_responses(drawn[BASE], drawn[name], policy)} |")


def start_setting(setting: Setting, path: list[tuple[int, ...]] | None, folder: Path) -> Drawn:
    """Run one setting in processes of its own."""
    file = folder / "setting.pt"
    torch.save((tuple(setting), path), file)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(setting.tp_size), "-m", "benchmarks.same_tokens"),
            *sys.argv[1:],
            *("--setting", str(file)),
        ],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Drawn(*torch.load(file, weights_only=True))


def run_setting(options: argparse.Namespace) -> None:
    """On each rank: lead the engine along the path, then let it generate freely."""
    from trb_megatron.config.options import ParallelConfig, RolloutConfig
    from trb_megatron.distributed.layout import initialize, is_rank_zero, shutdown
    from trb_megatron.huggingface.config import read_hf_config
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights
    from trb_megatron.rollout.engine import RolloutEngine
    from trb_megatron.rollout.sequences import ResponseSpec

    sizes, path = torch.load(options.setting, weights_only=True)
    setting = Setting(*sizes)
    layout = initialize(ParallelConfig(tensor_model_parallel_size=setting.tp_size))
    configs = [read_hf_config(folder) for folder in (options.student, options.teacher)]
    size = -(-max(config.vocab_size for config in configs) // setting.tp_size) * setting.tp_size
    models = []
    for config in configs:
        model = build_model(config, layout, vocab_size=size, dtype=torch.float32)
        load_hf_weights(model, config, layout)
        models.append(model.eval().requires_grad_(False))
    engine = RolloutEngine(
        *models,
        layout,
        RolloutConfig(max_sequences=setting.max_sequences, draft_tokens=setting.draft_tokens),
    )
    requests = build_requests(options.student)
    policies = build_policies(options, configs[0].vocab_size, layout.tp_group)

    def generate(policy: Any, seed: int) -> list[tuple[int, ...]]:
        spec = ResponseSpec(
            max_response_tokens=options.response_tokens, stop_ids=(), seed=seed, step=0
        )
        return [rollout.response_ids for rollout in engine.generate(requests, policy, spec)]

    tokens = {
        (name, seed): generate(policy, seed)
        for name, policy in policies.items()
        for seed in range(options.seeds)
    }
    guide = Guide(policies["TRB"], path or tokens["TRB", 0], layout.tp_group)
    guide.learn_keys(requests)
    generate(guide, 0)
    if is_rank_zero():
        torch.save((guide.logits, tokens), options.setting)
    shutdown()


def build_requests(student: Path) -> list[Any]:
    """The questions, rendered by the student's chat template where it has one."""
    from transformers import AutoTokenizer

    from trb_megatron.rollout.sequences import Request

    tokenizer = AutoTokenizer.from_pretrained(student)
    requests = []
    for number, question in enumerate(QUESTIONS):
        text = question
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        requests.append(Request(number, 0, tuple(ids)))
    return requests


def build_policies(
    options: argparse.Namespace, num_valid: int, tp_group: Any = None
) -> dict[str, Any]:
    """The two policies, which keep stop events as they are."""
    from trb_megatron.behavior.policies import BlendPolicy, StudentPolicy
    from trb_megatron.behavior.stop_alignment import StopAlignment

    shared: Any = {"temperature": 1.0, "num_valid": num_valid, "tp_group": tp_group}
    blend = BlendPolicy(kl_budget=options.kl_budget, alignment=StopAlignment((0,), (0,)), **shared)
    return {"student alone": StudentPolicy(alignment=None, **shared), "TRB": blend}


class Guide:
    """A policy that leads along given responses, and keeps the logits on the way.

    Args:
        path: token ids of each response.
    """

    needs_teacher = True
    least_acceptance = 1.0

    def __init__(self, policy: Any, path: list[tuple[int, ...]], tp_group: Any) -> None:
        self._policy = policy
        self._path = path
        self._tp_group = tp_group
        self._token_by_key: dict[int, int] = {}
        self.logits: dict[int, tuple[Tensor, Tensor]] = {}

    def learn_keys(self, requests: list[Any]) -> None:
        """Note which token belongs to the key of which position (of seed 0)."""
        from trb_megatron.uniforms import position_keys, rollout_key

        for request, token_ids in zip(requests, self._path, strict=True):
            key = rollout_key(0, 0, request.prompt_index, request.rollout_index)
            keys = position_keys(key, torch.arange(len(token_ids))).tolist()
            self._token_by_key |= dict(zip(keys, token_ids, strict=True))

    def propose(self, student_logits_NU: Tensor, key_N: Tensor) -> Any:
        """The tokens of the path; any beyond its end, where a draft may look."""
        from trb_megatron.behavior.sampling import Sample

        token_ids = [self._token_by_key.get(key, 0) for key in key_N.tolist()]
        return Sample(torch.tensor(token_ids), torch.zeros(len(token_ids)))

    def draw(
        self, proposal: Any, student_logits_NU: Tensor, teacher_logits_NU: Tensor, key_N: Tensor
    ) -> tuple[Tensor, Any]:
        """The proposal, accepted."""
        from trb_megatron.distributed.vocab_parallel import all_gather

        _, record = self._policy.draw(proposal, student_logits_NU, teacher_logits_NU, key_N)
        record.accepted.fill_(True)
        student_NV, teacher_NV = (
            all_gather(logits_NU, self._tp_group).transpose(0, 1).flatten(1)
            for logits_NU in (student_logits_NU, teacher_logits_NU)
        )
        for row, key in enumerate(key_N.tolist()):
            if key in self._token_by_key:
                self.logits[key] = (student_NV[row].clone(), teacher_NV[row].clone())
        return proposal.token_ids, record


def draw_at_prefixes(drawn: Drawn, rule: Any, num_valid: int, num_keys: int) -> Tensor:
    """Tokens with shared keys at every prefix, [prefix, key]."""
    from trb_megatron.uniforms import position_keys, rollout_key

    rows = []
    for prefix, key in enumerate(sorted(drawn.logits)):
        keys = position_keys(rollout_key(1, prefix, torch.arange(num_keys), 0), torch.tensor(0))
        ids = []
        for key_N in keys.split(100):
            both = [row_V[:num_valid].expand(len(key_N), -1) for row_V in drawn.logits[key]]
            with torch.inference_mode():
                ids.append(rule.draw(rule.propose(both[0], key_N), *both, key_N)[0])
        rows.append(torch.cat(ids))
    return torch.stack(rows)


def compare_draws(
    first_PK: Tensor, second_PK: Tensor, base: Drawn, other: Drawn, rule: Any, num_valid: int
) -> str:
    """Columns of the first table."""
    mismatches = int((first_PK != second_PK).sum())
    variations = [
        total_variation(*(law(rule, *rows, num_valid) for rows in (base.logits[key], logits)))
        for key, logits in other.logits.items()
    ]
    rate, variation = mismatches / first_PK.numel(), sum(variations) / len(variations)
    ratio = f"{rate / variation:.1f}" if variation > 0 else "-"
    return f"{mismatches} | {1e6 * rate:.1f} | {1e6 * variation:.2f} | {ratio}"


def law(rule: Any, student_V: Tensor, teacher_V: Tensor, num_valid: int) -> Tensor:
    """The probabilities that a policy draws from, [V] float64."""
    if not rule.needs_teacher:
        return student_V[:num_valid].double().softmax(-1)
    # In float64: the solver's own rounding belongs to the draw, not to the law.
    student_1V, teacher_1V = (row_V[None, :num_valid].double() for row_V in (student_V, teacher_V))
    log_p, log_q = student_1V.log_softmax(-1), teacher_1V.log_softmax(-1)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        log_mu = ((1 - middle) * log_p + middle * log_q).log_softmax(-1)
        within = float((log_mu.exp() * (log_mu - log_p)).sum()) <= rule.kl_budget
        low, high = (middle, high) if within else (low, middle)
    return ((1 - low) * log_p + low * log_q).softmax(-1)[0]


def total_variation(p_V: Tensor, q_V: Tensor) -> float:
    """Half of the sum of absolute differences."""
    return 0.5 * float((p_V - q_V).abs().sum())


def compare_responses(base: Drawn, other: Drawn, policy: str) -> str:
    """Columns of the second table."""
    responses = compared = differing = 0
    for (name, seed), firsts in base.tokens.items():
        if name != policy:
            continue
        for first, second in zip(firsts, other.tokens[name, seed], strict=True):
            is_same = [a == b for a, b in zip(first, second, strict=True)]
            common = [*is_same, False].index(False)
            responses += 1
            compared += min(common + 1, len(first))
            differing += common < len(first)
    return f"{responses} | {compared:,} | {differing}"


if __name__ == "__main__":
    main()
