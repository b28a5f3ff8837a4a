"""What ranks really send, against the formulas of `benchmarks/communication.py`, byte for byte.

Every collective of a rank is counted where torch hands it to a process group, so that one that is
new or wider, by whatever function it is called, makes a test fail.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import communication
from tests.ranks import run_distributed, vocab_shard
from trb_megatron.behavior import solver
from trb_megatron.behavior.coupling import draw_tokens
from trb_megatron.behavior.moments import evaluate
from trb_megatron.behavior.policies import BlendPolicy, StudentPolicy
from trb_megatron.behavior.solver import solve_behavior
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.loss.fused import fused_loss
from trb_megatron.loss.losses import LOSSES
from trb_megatron.loss.rules import LossOptions
from trb_megatron.loss.walk import FusedLossSettings, OutputLayer
from trb_megatron.uniforms import position_keys, rollout_key

NUM_ROWS, NUM_IDS, HIDDEN_SIZE, TOP_K = 60, 1000, 24, 8
WIDTH = 4  # bytes of a hidden state's number
ALIGNMENT = StopAlignment(student_ids=(3,), teacher_ids=(7, 3))
Group = tuple[int, ...]
"""Its ranks."""


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# What a rank sends in a ring of n ranks, given the arguments of the operation.
RING: dict[str, Callable[[Sequence[Any], int], int]] = {
    "allgather_": lambda args, n: (n - 1) * args[1][0].nbytes,
    "_allgather_base_": lambda args, n: (n - 1) * args[1].nbytes,
    "_reduce_scatter_base_": lambda args, n: (n - 1) * args[0].nbytes,
    "allgather_into_tensor_coalesced_": lambda args, n: (n - 1) * _nbytes(args[1]),
    "reduce_scatter_tensor_coalesced_": lambda args, n: (n - 1) * _nbytes(args[0]),
    "allreduce_": lambda args, n: 2 * (n - 1) * args[0][0].nbytes // n,
}


class CollectiveCounter(TorchDispatchMode):
    """Calls, and bytes sent, of every operation of every process group; groups of one send none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Group, str]] = Counter()
        self.sent: Counter[tuple[Group, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            group = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
            name = func.overloadpacket.__name__
            if len(group) > 1:
                self.calls[group, name] += 1
                self.sent[group, name] += RING[name](args, len(group))
        return func(*args, **(kwargs or {}))


class Measured(NamedTuple):
    """One operation on real ranks."""

    calls: dict[str, int]
    sent: int
    expected: int
    """Bytes, by the formulas."""


# ---------------------------------------------------------------- on vocabulary shards


class EvaluationCounter:
    """Counts the rounds of the solver, and the values of β that are tried on rows."""

    def __enter__(self) -> "EvaluationCounter":
        self.rounds = self.evaluations = 0
        self._patch = mock.patch.object(solver, "evaluate", self._evaluate)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    def _evaluate(self, rows: Any, candidates_MJ: Tensor, *args: Any) -> Any:
        self.rounds += 1
        self.evaluations += candidates_MJ.numel()
        return evaluate(rows, candidates_MJ, *args)


class Shards(NamedTuple):
    """Random logits on this rank's shard; the world is the tensor-parallel group."""

    group: dist.ProcessGroup
    student_NU: Tensor
    teacher_NU: Tensor
    key_N: Tensor

    @classmethod
    def build(cls) -> "Shards":
        group = dist.group.WORLD
        generator = torch.Generator().manual_seed(0)
        student_NV = 3 * torch.randn(NUM_ROWS, NUM_IDS, generator=generator)
        teacher_NV = student_NV + torch.randn(NUM_ROWS, NUM_IDS, generator=generator)
        # Nearly deterministic models: their KL climbs in jumps, which take several rounds.
        student_NV[:20] *= 20
        teacher_NV[:20] = teacher_NV[:20].flip(0) * 30
        key_N = position_keys(rollout_key(0, 0, torch.arange(NUM_ROWS), 0), torch.tensor(0))
        return cls(group, vocab_shard(student_NV, group), vocab_shard(teacher_NV, group), key_N)

    @property
    def policy_options(self) -> dict[str, Any]:
        return {
            "temperature": 1.0,
            "num_valid": NUM_IDS,
            "alignment": ALIGNMENT,
            "tp_group": self.group,
        }


def measure_shards() -> dict[str, Measured]:
    """Every operation on vocabulary shards."""
    shards = Shards.build()
    return {
        **_measure_solver_and_draw(shards),
        **_measure_policies(shards),
        "loss": _measure_loss(shards.group),
    }


def _measure_solver_and_draw(shards: Shards) -> dict[str, Measured]:
    group, tp_size = shards.group, dist.get_world_size()
    budget_N = torch.full((NUM_ROWS,), 0.02)
    budget_N[50:55], budget_N[55:] = 0.0, 1e9
    with CollectiveCounter() as counter, EvaluationCounter() as tried:
        behavior = solve_behavior(
            shards.student_NU, shards.teacher_NU, budget_N, tp_group=group, num_valid=NUM_IDS
        )
    expected = communication.blend_bytes(NUM_ROWS, tried.evaluations, tp_size)
    blend = _sum_up(counter, expected)
    assert blend.calls == {"allgather_": 1 + tried.rounds}
    assert tried.rounds > 4 and tried.evaluations > 2 * NUM_ROWS

    logprobs_NU = behavior.student.logprobs(), behavior.logprobs()
    proposed_N = logprobs_NU[0].argmax(dim=-1)
    with CollectiveCounter() as counter:
        drawn = draw_tokens(*logprobs_NU, proposed_N, shards.key_N, tp_group=group)
    rejected = int((~drawn.accepted).sum())
    assert 0 < rejected < NUM_ROWS
    draw = _sum_up(counter, communication.draw_bytes(NUM_ROWS, rejected, tp_size))
    return {"blend": blend, "draw": draw}


def _measure_policies(shards: Shards) -> dict[str, Measured]:
    tp_size, key_N = dist.get_world_size(), shards.key_N
    policy = BlendPolicy(kl_budget=0.02, **shards.policy_options)
    with CollectiveCounter() as counter:
        proposal = policy.propose(shards.student_NU, key_N)
    expected = communication.proposal_bytes(NUM_ROWS, tp_size)
    expected += communication.stop_bytes(NUM_ROWS, 1, tp_size)
    measured = {"proposal": _sum_up(counter, expected)}

    with CollectiveCounter() as counter, EvaluationCounter() as tried:
        _, record = policy.draw(proposal, shards.student_NU, shards.teacher_NU, key_N)
    rejected = int((~record.accepted).sum())
    expected = communication.blend_bytes(NUM_ROWS, tried.evaluations, tp_size)
    expected += communication.stop_bytes(NUM_ROWS, 1 + 2, tp_size)
    expected += communication.draw_bytes(NUM_ROWS, rejected, tp_size)
    expected += communication.record_bytes(NUM_ROWS, tp_size)
    measured["policy"] = _sum_up(counter, expected)

    with CollectiveCounter() as counter:
        student = StudentPolicy(**shards.policy_options)
        student.draw(student.propose(shards.student_NU, key_N), shards.student_NU, None, key_N)
    expected = communication.proposal_bytes(NUM_ROWS, tp_size)
    expected += communication.stop_bytes(NUM_ROWS, 1, tp_size)
    measured["student's draw"] = _sum_up(counter, expected)
    return measured


def _measure_loss(group: dist.ProcessGroup) -> Measured:
    """The default loss and its backward, in chunks."""
    tp_size, generator = dist.get_world_size(), torch.Generator().manual_seed(1)
    layers = []
    for _ in range(2):
        hidden_NH = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator)
        weight_VH = torch.randn(NUM_IDS, HIDDEN_SIZE, generator=generator)
        weight_UH = vocab_shard(weight_VH.T, group).T.contiguous()
        layers.append(OutputLayer(hidden_NH.requires_grad_(), weight_UH.requires_grad_()))
    settings = FusedLossSettings(
        loss=LOSSES["reverse_kl_topk"],
        options=LossOptions(top_k=TOP_K, temperature=1.0, jsd_weight=0.5, veto_coef=0.0),
        workspace_bytes=200_000,
        tp_group=group,
        num_valid=NUM_IDS,
        alignment=ALIGNMENT,
    )
    with CollectiveCounter() as counter:
        fused_loss(settings, *layers).loss_sum.backward()
    expected = communication.topk_loss_bytes(NUM_ROWS, TOP_K, tp_size)
    expected += communication.stop_bytes(NUM_ROWS, 1 + 2, tp_size)
    expected += communication.loss_gradient_bytes(NUM_ROWS, HIDDEN_SIZE, tp_size, width=4)
    return _sum_up(counter, expected)


def _sum_up(counter: CollectiveCounter, expected: int) -> Measured:
    calls = {name: count for (_, name), count in counter.calls.items()}
    return Measured(calls, sum(counter.sent.values()), expected)


@pytest.fixture(scope="module", params=[2, 4])
def shards(request: pytest.FixtureRequest) -> list[dict[str, Measured]]:
    return run_distributed(measure_shards, request.param, timeout_s=300)


@pytest.mark.parametrize("name", ["blend", "draw", "proposal", "policy", "student's draw", "loss"])
def test_bytes_on_shards_are_those_of_the_formula(
    shards: list[dict[str, Measured]], name: str
) -> None:
    for measured in shards:
        assert measured[name].sent == measured[name].expected > 0


def test_only_the_gradient_of_the_loss_is_reduced(shards: list[dict[str, Measured]]) -> None:
    for measured in shards:
        assert measured["loss"].calls["allreduce_"] == 1
        assert set(measured["policy"].calls) == {"allgather_"}


# ---------------------------------------------------------------- a training step


def measure_training(config_file: Path, models: tuple[str, ...]) -> dict[str, Measured]:
    """The teacher's pass, and the student's forward, backward and update, at TP 2 x DP 2."""
    from tests.runs import make_trainer
    from trb_megatron.batch import Rollout, build_microbatches
    from trb_megatron.rollout.step_settings import policy_at

    overrides = (
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "training.recompute_activations=true",
        "rollout.keep_teacher_hidden=false",
        *models,
    )
    trainer = make_trainer(config_file, overrides)
    layout = trainer.layout
    tp_ranks, dp_ranks = (
        tuple(dist.get_process_group_ranks(group)) for group in (layout.tp_group, layout.dp_group)
    )
    rollouts = [Rollout(i, 0, (5, 6, 7), tuple(range(8, 20)), stopped=False) for i in range(4)]
    microbatches = build_microbatches(rollouts, 30, layout.device, 2)
    num_tokens = sum(len(microbatch.tokens_T) for microbatch in microbatches)
    num_loss_tokens = sum(len(rollout.response_ids) for rollout in rollouts)

    policy = policy_at(0, trainer.config, trainer.sources, layout)
    with CollectiveCounter() as counter:
        microbatches = trainer.teacher(microbatches, policy)
    teacher = trainer.sources.teacher
    sizes = (teacher.num_layers, teacher.hidden_size, 2)
    expected = communication.forward_bytes(num_tokens, *sizes, WIDTH)
    expected += _expected_of_groups(teacher, num_tokens, passes=1)
    measured = {"teacher": _sum_up(counter, expected)}

    with CollectiveCounter() as counter:
        trainer.gradients(microbatches)
        trainer.update()
    expected = _expected_of_student(trainer, num_tokens, num_loss_tokens)
    measured["student"] = _of_group(counter, tp_ranks, expected)
    # Megatron pads its buffers, so that they can be cut into equal parts.
    num_parameters = sum(buffer.numel for buffer in trainer.student_ddp.buffers)
    expected = communication.gradient_bytes(num_parameters, 2, WIDTH)
    measured["gradients"] = _of_group(counter, dp_ranks, expected, "tensor_coalesced_")
    return measured


def _expected_of_student(trainer: Any, num_tokens: int, num_loss_tokens: int) -> int:
    """Bytes in the student's tensor-parallel group, by the formulas."""
    student, alignment = trainer.sources.student, trainer.sources.alignment
    sizes = (student.num_layers, student.hidden_size, 2)
    num_stops = len(alignment.student_ids) + len(alignment.teacher_ids)
    norms = sum(
        parameter.numel()
        for parameter in trainer.models.student.parameters()
        if getattr(parameter, "sequence_parallel", False)
    )
    return (
        communication.forward_bytes(num_tokens, *sizes, WIDTH)
        + communication.backward_bytes(
            num_tokens, *sizes, sequence_parallel=True, recompute=True, width=WIDTH
        )
        + _expected_of_groups(student, num_tokens, passes=3)
        + communication.topk_loss_bytes(num_loss_tokens, trainer.config.loss.top_k, 2)
        + communication.stop_bytes(num_loss_tokens, num_stops, 2)
        + communication.loss_gradient_bytes(num_loss_tokens, student.hidden_size, 2, WIDTH)
        + communication.norm_gradient_bytes(norms, 2)
    )


def _expected_of_groups(model: HFModelConfig, num_tokens: int, passes: int) -> int:
    if model.num_query_groups >= 2:
        return 0
    return communication.shared_group_bytes(
        num_tokens, model.num_layers, model.num_qkv_rows, 2, passes, WIDTH
    )


def _of_group(
    counter: CollectiveCounter, group: Group, expected: int, ending: str = ""
) -> Measured:
    """What was sent in one group, by operations whose names end so."""
    keys = [key for key in counter.calls if key[0] == group and key[1].endswith(ending)]
    calls = {name: counter.calls[ranks, name] for ranks, name in keys}
    return Measured(calls, sum(counter.sent[key] for key in keys), expected)


@pytest.fixture(scope="module", params=["two query groups", "one"])
def training(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Measured]]:
    """Of a student with so many query groups."""
    from tests.layouts import write_inputs  # imports transformers, which every rank would do

    config_file = write_inputs(tmp_path_factory.mktemp("communication"))
    folder = config_file.parent
    swapped = (f"student.path={folder}/teacher", f"teacher.path={folder}/student")
    models = swapped if request.param == "one" else ()
    return run_distributed(measure_training, 4, config_file, models, timeout_s=300)


@pytest.mark.parametrize("name", ["teacher", "student", "gradients"])
def test_bytes_of_a_training_step_are_those_of_the_formula(
    training: list[dict[str, Measured]], name: str
) -> None:
    for measured in training:
        assert measured[name].sent == measured[name].expected > 0, measured[name]


# ---------------------------------------------------------------- the page


def test_traffic_of_gradients_is_split_over_the_links() -> None:
    step = communication.Setting()
    total = 6 * step.student.num_parameters // step.tp_size
    for num_gpus, share in ((8, 3 / 4), (64, 31 / 32), (512, 255 / 256)):
        traffic = communication.data_parallel_traffic(step, num_gpus)
        assert traffic.nvlink + traffic.network == pytest.approx(share * total, rel=1e-6)
        assert traffic.network == pytest.approx(0 if num_gpus == 8 else share * total / 4, rel=1e-6)


def test_tables_of_the_pages_are_those_that_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    communication.main()
    root = Path(__file__).parents[2]
    pages = [root / "launch" / "README.md", *sorted((root / "docs").glob("*.md"))]
    lines = {line.strip() for page in pages if page.exists() for line in page.open()}
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert [row for row in rows if row not in lines] == []
