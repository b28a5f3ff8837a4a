"""Rollouts on a GPU that is not there: tensors are where they must be, and reads are planned."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.fake_cuda import HostRead, fake_cuda, join_fake_world, run_alone
from tests.published import QWEN3_1_7B, QWEN3_8B, QWEN3_32B, write_model

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake tensors of a GPU need a torch that is built for CUDA"
)

SEQUENCES, DRAFTS, TOKENS = 8, 4, 10
# Functions that read from the GPU, and the value that they find there.
READS = {
    "CacheSize.num_pages": 1000.0,
    "raise_at_row": 0.0,  # no row of logits has a problem
    "_search": 1.0,  # each row is searched, in both arithmetics
    "OpenRows.keep": 0.0,  # one round settles it
    "_build_behavior": 1.0,  # all rows are wide
    "draw_tokens": 1.0,  # all proposals are rejected
    "sample_residual": 1.0,
    "Generation._commit": 1.0,  # id 1 was proposed and drawn at all positions
}

# What docstrings promise of a round and of a solve in it: how often each function reads.
A_ROUND = {
    "student": {"raise_at_row": 1, "Generation._commit": 1},
    "blend": {
        "raise_at_row": 3,
        "_search": 2,
        "OpenRows.keep": 2,
        "_build_behavior": 1,
        "draw_tokens": 1,
        "sample_residual": 1,
        "Generation._commit": 1,
    },
}
A_SOLVE = {
    "student": {},
    "blend": {"raise_at_row": 1, "_search": 2, "OpenRows.keep": 2, "_build_behavior": 1},
}


def generate(folders: tuple[Path, Path], policy_name: str) -> tuple[list[int], list[HostRead]]:
    """Lengths of the responses, and what the host read to sample them."""
    from trb_megatron.behavior.policies import BlendPolicy, StudentPolicy
    from trb_megatron.behavior.stop_alignment import StopAlignment
    from trb_megatron.config.options import RolloutConfig
    from trb_megatron.huggingface.config import read_hf_config
    from trb_megatron.models.build import build_model
    from trb_megatron.rollout.engine import RolloutEngine
    from trb_megatron.rollout.sequences import Request, ResponseSpec

    layout = join_fake_world()
    shared: Any = {"temperature": 1.0, "num_valid": 151_669, "tp_group": layout.tp_group}
    with fake_cuda(READS) as mode:
        student, teacher = (
            build_model(
                read_hf_config(folder), layout, vocab_size=151_936, dtype=torch.bfloat16
            ).eval()
            for folder in folders
        )
        policy = {
            "student": StudentPolicy(alignment=None, **shared),
            "blend": BlendPolicy(kl_budget=0.01, alignment=StopAlignment((0,), (0,)), **shared),
        }[policy_name]
        config = RolloutConfig(max_sequences=SEQUENCES, draft_tokens=DRAFTS)
        engine = RolloutEngine(student, teacher, layout, config)
        requests = [Request(i, 0, tuple(range(2, 18 + i))) for i in range(SEQUENCES)]
        spec = ResponseSpec(max_response_tokens=TOKENS, stop_ids=(0,), seed=0, step=0)
        rollouts = engine.generate(requests, policy, spec)
    return [len(rollout.response_ids) for rollout in rollouts], mode.reads


@pytest.mark.parametrize(
    ("policy", "student", "teacher"),
    [
        ("student", QWEN3_1_7B, QWEN3_8B),
        ("blend", QWEN3_1_7B, QWEN3_8B),
        ("blend", QWEN3_8B, QWEN3_32B),
    ],
    ids=["student-1.7B", "blend-1.7B-8B", "blend-8B-32B"],
)
def test_rollouts_at_published_sizes(
    tmp_path: Path, policy: str, student: dict[str, Any], teacher: dict[str, Any]
) -> None:
    folders = write_model(tmp_path / "s", student), write_model(tmp_path / "t", teacher)
    lengths, reads = run_alone(generate, folders, policy)
    assert lengths == [TOKENS] * SEQUENCES
    rounds = TOKENS if policy == "student" else TOKENS // (DRAFTS + 1)
    of_round = [read for read in reads if "Generation.round" in read.functions]
    assert len(of_round) + 2 == len(reads)  # a cache's size is agreed on
    drafting = {"Generation.draft", "Generation.score", "CachedModel.forward"}
    assert not [read for read in of_round if drafting & set(read.functions)]
    counts = Counter(read.reader for read in of_round)
    assert counts == {reader: rounds * count for reader, count in A_ROUND[policy].items()}
    solves = Counter(read.reader for read in of_round if "solve_behavior" in read.functions)
    assert solves == {reader: rounds * count for reader, count in A_SOLVE[policy].items()}


def read_a_draft(folders: tuple[Path, Path]) -> None:
    """A rollout whose proposals the host looks at."""
    from trb_megatron.behavior.policies import StudentPolicy

    propose = StudentPolicy.propose

    def look(policy: StudentPolicy, logits_NU: torch.Tensor, key_N: torch.Tensor) -> Any:
        sample = propose(policy, logits_NU, key_N)
        assert sample[0].max().item() >= 0
        return sample

    with mock.patch.object(StudentPolicy, "propose", look):
        generate(folders, "student")


def test_read_of_a_draft_is_noticed(tmp_path: Path) -> None:
    folders = write_model(tmp_path / "s", QWEN3_1_7B), write_model(tmp_path / "t", QWEN3_1_7B)
    with pytest.raises(AssertionError, match=r"Generation\._run_student reads from the GPU"):
        run_alone(read_a_draft, folders)


def leave_on_the_cpu(folders: tuple[Path, Path]) -> None:
    """A rollout whose keys stay on the host."""
    from trb_megatron.rollout import generation

    class View(generation.RoundView):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.key_SG = torch.zeros(self.shape, dtype=torch.long)

    with mock.patch.object(generation, "RoundView", View):
        generate(folders, "student")


def test_tensor_of_the_cpu_is_noticed(tmp_path: Path) -> None:
    folders = write_model(tmp_path / "s", QWEN3_1_7B), write_model(tmp_path / "t", QWEN3_1_7B)
    with pytest.raises(AssertionError, match="a tensor of the CPU among those of the GPU"):
        run_alone(leave_on_the_cpu, folders)
