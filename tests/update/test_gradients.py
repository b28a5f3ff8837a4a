"""The gradient of every parameter at each layout, in chunks or not, packed or not.

The yardstick knows neither packing nor chunks: one sequence at a time through Megatron's plain
causal attention, and a loss of dense logits that autograd takes back to the weights.
"""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.families import make_family_checkpoint
from tests.layouts import write_inputs
from tests.ranks import run_distributed
from tests.reference import align_by_definition
from tests.runs import make_trainer
from trb_megatron.batch import Microbatch, Rollout, build_microbatches
from trb_megatron.behavior.policies import StudentPolicy
from trb_megatron.update.exchange import exchange_rollouts

LAYOUTS = (*product((1, 2), (1, 2)), (4, 1))
# The tied student shares a weight, at PP 2 over stages; the untied one has a weight that autograd
# never gives a gradient. The tied one has two query groups, the others one, which ranks share.
CASES = {
    "tied": ("loss.name=reverse_kl_topk",),
    "untied": (
        *("loss.name=reverse_kl_full", "loss.temperature=0.7"),
        "training.teacher_hidden_device=host",
        *("student.path={}/teacher", "teacher.path={}/student"),
    ),
    "biases": ("student.path={}/qwen2-one-group", "teacher.path={}/qwen2"),
}
BUDGETS = {"token": 1, "all": 10**9}  # bytes for chunks of one token, and of all
PACKED, ALONE = 10**6, 1  # tokens of a microbatch: all rollouts, or one


def rollouts() -> list[Rollout]:
    """Some that stop and one that does not, of uneven lengths; ids of the tests' tokenizer."""
    lengths = ((5, 9), (12, 1), (3, 14), (7, 6), (1, 2))
    generator = torch.Generator().manual_seed(3)
    made = []
    for index, (num_prompt, num_response) in enumerate(lengths):
        ids = torch.randint(3, 54, (num_prompt + num_response,), generator=generator).tolist()
        ids[-1] = 2 if index != 3 else ids[-1]
        made.append(Rollout(index, 0, tuple(ids[:num_prompt]), tuple(ids[num_prompt:]), True))
    return made


def write_gradients(trainer: Any, folder: Path, max_tokens: int) -> None:
    """One forward and backward; the gradients, in Hugging Face's names, as if they were weights."""
    from trb_megatron.models.weights import save_hf_checkpoint

    student = trainer.models.student
    microbatches = build_microbatches(
        rollouts(), max_tokens, trainer.layout.device, student.token_multiple
    )
    compute_gradients(trainer, microbatches)
    weights = [param.detach().clone() for param in student.parameters()]
    for param in student.parameters():
        param.data.copy_(param.main_grad)
    save_hf_checkpoint(student, trainer.sources.student, trainer.layout, folder)
    for param, weight in zip(student.parameters(), weights, strict=True):
        param.data.copy_(weight)


def compute_gradients(trainer: Any, microbatches: list[Microbatch]) -> None:
    """Stages 5 and 6 of a step, the teacher's hidden states from a pass of its own."""
    student = StudentPolicy(temperature=1.0, num_valid=1, alignment=None, tp_group=None)
    trainer.gradients(trainer.teacher(microbatches, student))


def plain_forward(model: Any, microbatch: Microbatch) -> torch.Tensor:
    assert len(microbatch.cu_lengths) == 2
    return model(microbatch.tokens_T[None], microbatch.positions_T[None], None)


def dense_loss(
    trainer: Any, gradients: Any, hidden_NH: torch.Tensor, microbatch: Microbatch
) -> Any:
    """The trainer's loss from all logits at once."""
    from trb_megatron.loss.losses import LOSSES

    models = trainer.models
    assert microbatch.teacher_hidden_NH is not None
    student_NV, teacher_NV = (
        align_by_definition(
            model.project(hidden) / trainer.config.loss.temperature,
            own_ids,
            trainer.sources.alignment,
        )
        for model, hidden, own_ids in (
            (models.student, hidden_NH, trainer.sources.alignment.student_ids),
            (models.teacher, microbatch.teacher_hidden_NH, trainer.sources.alignment.teacher_ids),
        )
    )
    name, top_k = trainer.config.loss.name, trainer.config.loss.top_k
    output = LOSSES[name](
        student_NV, teacher_NV, num_valid=trainer.sources.tokenizer_size, top_k=top_k
    )
    return output.per_token.sum(), {"loss": output.per_token.detach().sum()}


def _with_dense_loss(trainer: Any) -> Any:
    return lambda *args: dense_loss(trainer, *args)


def write_all(config_file: Path, tp: int, pp: int, overrides: tuple[str, ...]) -> None:
    """Gradients of each case, chunk size and packing, each in a folder of its name."""
    from trb_megatron.loss.fused import fused_loss
    from trb_megatron.update.gradients import StepGradients

    root = config_file.parent
    for case, options in CASES.items():
        trainer = make_trainer(
            config_file,
            (
                f"run.dir={root}/run-{case}-{tp}-{pp}",
                f"parallel.tensor_model_parallel_size={tp}",
                f"parallel.pipeline_model_parallel_size={pp}",
                "optimizer.distributed=false",
                *(option.format(root) for option in options),
                *overrides,
            ),
        )
        if (tp, pp) == (1, 1):
            with (
                mock.patch("trb_megatron.models.forward.forward_microbatch", plain_forward),
                mock.patch.object(StepGradients, "loss", _with_dense_loss(trainer)),
            ):
                write_gradients(trainer, root / f"{case}-yardstick", ALONE)
        for budget, max_tokens in product(BUDGETS, (PACKED, ALONE)):
            chunked = partial(_with_budget, fused_loss, BUDGETS[budget])
            with mock.patch("trb_megatron.update.gradients.fused_loss", chunked):
                name = f"{case}-{tp}-{pp}-{budget}-{max_tokens}"
                write_gradients(trainer, root / name, max_tokens)


def _with_budget(fused_loss: Any, budget: int, settings: Any, *args: Any, **kwargs: Any) -> Any:
    return fused_loss(replace(settings, workspace_bytes=budget), *args, **kwargs)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all gradients."""
    config_file = write_inputs(tmp_path_factory.mktemp("gradients"))
    for family in ("qwen2-one-group", "qwen2"):
        make_family_checkpoint(config_file.parent / family, family)
    for tp, pp in LAYOUTS:
        sequence_parallel = ("parallel.sequence_parallel=true",) if tp > pp else ()
        run_distributed(write_all, tp * pp, config_file, tp, pp, sequence_parallel, timeout_s=300)
    return config_file.parent


@pytest.mark.parametrize("max_tokens", [PACKED, ALONE], ids=["packed", "alone"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_every_gradient_is_that_of_the_plain_way(
    gradients: Path, tp: int, pp: int, budget: str, max_tokens: int
) -> None:
    for case in CASES:
        exact = read_tensors(gradients / f"{case}-yardstick")
        found = read_tensors(gradients / f"{case}-{tp}-{pp}-{budget}-{max_tokens}")
        assert found.keys() == exact.keys() and len(exact) > 30
        assert ("lm_head.weight" in exact) == (case != "tied")
        for name, gradient in exact.items():
            largest = gradient.abs().max()
            assert largest > 0, name
            assert (found[name] - gradient).abs().max() <= 1e-4 * largest, (case, name)


def measure_balance(config_file: Path) -> tuple[list[list[tuple[int, ...]]], float, float]:
    """Who trains on what where one replica drew all the long responses, and two gradient norms."""
    trainer = make_trainer(config_file, (f"run.dir={config_file.parent}/balance",))
    rank, device = trainer.layout.dp_rank, trainer.layout.device
    width = trainer.models.teacher.config.hidden_size
    drawn = [
        replace(r, teacher_hidden=torch.full((len(r.response_ids), width), float(r.prompt_index)))
        for r in rollouts()
        if (r.prompt_index in (0, 2, 3)) == (rank == 0)
    ]
    balanced = exchange_rollouts(drawn, trainer.layout, hidden_on_host=False)
    norms = []
    for share in (drawn, balanced):
        trainer.gradients(build_microbatches(share, PACKED, device))
        norms.append(float(trainer.optimizer.get_grad_norm()))
    found: list[Any] = [None, None]
    torch.distributed.all_gather_object(found, [(r.prompt_index, len(r) - 1) for r in balanced])
    for rollout in balanced:
        assert rollout.teacher_hidden is not None
        assert (rollout.teacher_hidden == rollout.prompt_index).all()
    return found, norms[0], norms[1]


def test_replicas_train_on_as_many_tokens_and_to_the_same_effect(tmp_path: Path) -> None:
    config_file = write_inputs(tmp_path)
    for found, before, after in run_distributed(measure_balance, 2, config_file):
        assert sorted(index for share in found for index, _ in share) == [0, 1, 2, 3, 4]
        first, second = (sum(length for _, length in share) for share in found)
        assert abs(first - second) <= 3
        assert after == pytest.approx(before, rel=1e-5)
