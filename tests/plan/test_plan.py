"""The plan of a run against what real ranks hold, published counts, and what it refuses."""

import re
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.families import make_family_checkpoint
from tests.layouts import LAYOUTS, Layout, ProbeResult, layout_overrides, write_inputs
from tests.published import LLAMA3_70B, QWEN3_1_7B, QWEN3_8B, QWEN3_30B_A3B, write_model
from tests.ranks import run_distributed
from tests.runs import Holdings, make_trainer, measure_holdings, num_bytes
from tests.tiny import make_checkpoint
from trb_megatron.behavior.policies import (
    BlendPolicy,
    Policy,
    SKDPolicy,
    TeacherPolicy,
)
from trb_megatron.behavior.stop_alignment import StopAlignment
from trb_megatron.config.options import Config
from trb_megatron.config.reading import load_config
from trb_megatron.config.values import ConfigError
from trb_megatron.models.sources import DTYPES, ModelSources
from trb_megatron.plan.layout import bucket_sizes
from trb_megatron.plan.memory import DRAW_COPIES, GB, PROPOSE_COPIES
from trb_megatron.plan.plan import Plan, check_memory, make_plan
from trb_megatron.plan.report import describe_plan
from trb_megatron.update.state_size import optimizer_bytes

# ---------------------------------------------------------------- against real ranks


def plan_of(config: Config, world_size: int) -> Plan:
    return make_plan(config, ModelSources.read(config, with_teacher=True), world_size)


def check_holdings(config: Config, holdings: list[Holdings]) -> None:
    """Compare what ranks hold with the plan of their stages."""
    plan = plan_of(config, len(holdings))
    for rank, held in enumerate(holdings):
        assert held.stage == rank // (plan.tp_size * plan.dp_size)
        need = plan.memory[held.stage]
        for name, model in plan.models.items():
            assert held.num_parameters[name] == model.stages[held.stage].num_parameters
        assert (held.weights, held.gradients) == (need.weights, need.gradients)
        assert held.teacher == need.teacher
        assert held.optimizer <= need.optimizer
    by_stage = groupby(holdings, key=lambda held: held.stage)
    state = optimizer_bytes(DTYPES[config.training.precision])
    for stage, ranks in by_stage:
        num_copies = plan.tp_size * (1 if config.optimizer.distributed else plan.dp_size)
        num_states = num_copies * plan.models["student"].stages[stage].num_parameters
        assert sum(held.optimizer for held in ranks) == num_states * state


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_plan_is_what_ranks_hold_in_fp32(
    probe_config: Path, probe_results: dict[Layout, ProbeResult], layout: Layout
) -> None:
    config = load_config(probe_config, layout_overrides(layout))
    check_holdings(config, probe_results[layout].holdings)


BF16 = {
    # A mixture of experts learns from a dense model.
    "qwen3_moe": Layout(tp=2, dp=2),
    # Two stages share a tied embedding, and two replicas cut its optimizer.
    "llama": Layout(pp=2, dp=2),
    # Ranks share query groups: each caches the student's only one, and one of the teacher's two.
    "qwen2-one-group": Layout(tp=4, overrides=("parallel.sequence_parallel=true",)),
}


def _hold(config_file: Path, overrides: tuple[str, ...]) -> tuple[Holdings, int]:
    """What this rank holds after a step, and bytes of the caches for all slots."""
    from trb_megatron.models.forward import CachedModel
    from trb_megatron.rollout.sequences import Request

    trainer = make_trainer(config_file, overrides)
    trainer.train_step()
    config, layout, models = trainer.config, trainer.layout, trainer.models
    longest = (0,) * config.data.max_prompt_tokens
    share = config.training.prompts_per_step * config.rollout.rollouts_per_prompt // layout.dp_size
    table = trainer.engine.make_page_table(
        [Request(0, i, longest) for i in range(share)],
        config.rollout.max_response_tokens,
        with_teacher=True,
    )
    caches = [CachedModel(model, table, layout).cache for model in (models.student, models.teacher)]
    tensors = [value for cache in caches for value in vars(cache).values()]
    pools = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return measure_holdings(trainer), num_bytes(pools)


@pytest.mark.parametrize("family", BF16)
def test_plan_is_what_ranks_hold_in_bf16(tmp_path: Path, family: str) -> None:
    config_file = write_inputs(tmp_path)
    make_family_checkpoint(tmp_path / "small", family, tied=True, max_position_embeddings=128)
    large = "qwen2" if family.startswith("qwen2") else "qwen3"  # with the same kind of tokenizer
    make_family_checkpoint(tmp_path / "large", large, max_position_embeddings=128)
    layout = BF16[family]
    overrides = [
        *layout_overrides(layout),
        *(f"student.path={tmp_path}/small", f"teacher.path={tmp_path}/large"),
        *("training.precision=bf16", "rollout.max_sequences=3", "training.steps=1"),
    ]
    config = load_config(config_file, overrides)
    found = run_distributed(_hold, layout.world_size, config_file, tuple(overrides), timeout_s=240)
    check_holdings(config, [held for held, _ in found])
    plan = plan_of(config, layout.world_size)
    for held, cache in found:
        assert cache == plan.memory[held.stage].cache_all


def test_shared_embedding_has_a_bucket_of_its_own() -> None:
    """Which shows where the replicas are no power of two: the parts are padded to 384 each."""
    sizes = {"embedding.word_embeddings.weight": 4096, "decoder.final_layernorm.weight": 32}
    assert sum(bucket_sizes(sizes, is_tied=True, pp_size=2, dp_size=3)) == 11 * 384 + 384
    for is_tied, pp_size in ((False, 2), (True, 1)):
        assert sum(bucket_sizes(sizes, is_tied, pp_size, dp_size=3)) == 11 * 384


# ---------------------------------------------------------------- against published numbers

PUBLISHED = (
    (QWEN3_1_7B, 1_720_574_976),
    (QWEN3_8B, 8_190_735_360),
    (QWEN3_30B_A3B, 30_532_122_624),
    (LLAMA3_70B, 70_553_706_496),
)


def write_config(folder: Path, student: dict[str, Any], teacher: dict[str, Any]) -> Path:
    write_model(folder / "student", student)
    write_model(folder / "teacher", teacher)
    file = folder / "config.yaml"
    file.write_text(
        f"""
run: {{dir: {folder}/run}}
student: {{path: {folder}/student}}
teacher: {{path: {folder}/teacher}}
data: {{path: {folder}/absent.jsonl}}
"""
    )
    return file


@pytest.mark.parametrize(("values", "published"), PUBLISHED, ids=lambda value: str(value)[:30])
def test_parameters_are_the_published_number(
    tmp_path: Path, values: dict[str, Any], published: int
) -> None:
    config_file = write_config(tmp_path, values, values)
    for tp, pp in ((1, 1), (4, 5)):
        config = load_config(config_file, layout_overrides(Layout(tp=tp, pp=pp)))
        assert plan_of(config, tp * pp).models["student"].num_parameters == published


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-1.7B learns from Qwen3-8B."""
    return write_config(tmp_path_factory.mktemp("plan"), QWEN3_1_7B, QWEN3_8B)


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_stages_and_ranks_hold_every_parameter_once(config_file: Path, name: str) -> None:
    """But norms, which all tensor-parallel ranks have, and a tied embedding, at both ends."""
    (one,) = plan_of(load_config(config_file), 1).models[name].stages
    cut = plan_of(load_config(config_file, layout_overrides(Layout(tp=2, pp=3))), 12).models[name]
    model = cut.config
    num_norms = model.num_layers * (2 * model.hidden_size + 2 * 128) + model.hidden_size
    copied = 151_936 * model.hidden_size if model.tied_embeddings else 0
    in_parts = 2 * sum(stage.num_parameters for stage in cut.stages)
    assert in_parts == one.num_parameters + num_norms + copied
    layers = [layer for stage in cut.stages for layer in stage.layers]
    assert layers == list(range(model.num_layers))


# ---------------------------------------------------------------- estimates


def _memory(config_file: Path, world_size: int, *overrides: str) -> Any:
    return plan_of(load_config(config_file, list(overrides)), world_size).memory


def test_estimates_move_with_what_causes_them(config_file: Path) -> None:
    tp2 = "parallel.tensor_model_parallel_size=2"
    (plain,) = _memory(config_file, 2, tp2)
    (cut,) = _memory(config_file, 2, tp2, "parallel.sequence_parallel=true")
    (recomputed,) = _memory(config_file, 2, tp2, "training.recompute_activations=true")
    (on_host,) = _memory(config_file, 2, tp2, "training.teacher_hidden_device=host")
    (student_only,) = _memory(config_file, 2, tp2, "behavior.kl_budget=0")
    (four_replicas,) = _memory(config_file, 8, tp2)
    assert plain.activations > cut.activations > recomputed.activations
    assert (on_host.hidden, student_only.hidden) == (0, plain.hidden)
    assert (on_host.host, plain.host) == (2 * plain.hidden, 0)
    assert on_host.rollouts < plain.rollouts
    assert student_only.cache_one < plain.cache_one / 2
    assert four_replicas.optimizer == pytest.approx(plain.optimizer / 4, rel=1e-6)
    assert (four_replicas.weights, four_replicas.teacher) == (plain.weights, plain.teacher)
    assert four_replicas.hidden == plain.hidden / 4


def test_earlier_stages_keep_more_microbatches(config_file: Path) -> None:
    pp4 = "parallel.pipeline_model_parallel_size=4"
    _, *later = (need.activations for need in _memory(config_file, 4, pp4))
    assert later == pytest.approx([3 * later[-1], 2 * later[-1], later[-1]])
    one_microbatch = ("training.prompts_per_step=1", "rollout.rollouts_per_prompt=2")
    _, *later = (need.activations for need in _memory(config_file, 4, pp4, *one_microbatch))
    assert len(set(later)) == 1


def test_activations_of_a_layer_by_hand(config_file: Path) -> None:
    """Qwen3-1.7B: of a token 4 h of norms, 3 (n + g) d of attention, 4 f of the MLP."""
    (need,) = _memory(
        config_file, 1, "training.max_tokens_per_microbatch=8192", "training.precision=bf16"
    )
    of_layer = 4 * 2048 + (3 * 16 + 3 * 8) * 128 + 4 * 6144
    assert need.activations == 2 * (8192 * 28 * of_layer + 151_936 * 2048)
    # 16 ranks, 8 query groups: each has a head, a key and a value, and gathers those of all.
    (need,) = _memory(
        config_file,
        16,
        *("training.max_tokens_per_microbatch=8192", "training.precision=bf16"),
        "parallel.tensor_model_parallel_size=16",
    )
    of_layer = 4 * 2048 + (2 + 1 + 16 + 2 * 8) * 128 + 4 * 6144 // 16
    assert need.activations == 2 * (8192 * 28 * of_layer + 151_936 // 16 * 2048)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if torch.is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            pointer, num_bytes = storage.data_ptr(), storage.nbytes()
            if pointer in self._users or pointer not in old:  # not a view of an argument
                self._now += num_bytes * (self._users[pointer] == 0)
                self._users[pointer] += 1
                weakref.finalize(tensor, self._drop, pointer, num_bytes)
        self.most = max(self.most, self._now)
        return result

    def _drop(self, pointer: int, num_bytes: int) -> None:
        self._users[pointer] -= 1
        if self._users[pointer] == 0:
            del self._users[pointer]
            self._now -= num_bytes


def _copies(call: Callable[[], Any], num_logits: int) -> float:
    with _LiveBytes() as live:
        call()
    return live.most / (4 * num_logits)


@pytest.mark.parametrize("name", DRAW_COPIES)
def test_a_draw_takes_the_memory_that_the_plan_has_for_it(name: str) -> None:
    shared: Any = {
        "temperature": 1.0,
        "num_valid": 49_000,
        "tp_group": None,
        "alignment": StopAlignment((2,), (3,)),
    }
    policies: dict[str, Callable[[], Policy]] = {
        "trb": lambda: BlendPolicy(kl_budget=0.01, **shared),
        "skd": lambda: SKDPolicy(top_k=25, teacher_temperature=1.0, **shared),
        "teacher": lambda: TeacherPolicy(**shared),
    }
    policy = policies[name]()
    torch.manual_seed(0)
    student_NU = 3 * torch.randn(16, 49_152)
    teacher_NU = student_NU + torch.randn(16, 49_152)
    key_N = torch.randint(2**40, (16,))
    proposal = policy.propose(student_NU, key_N)
    of_proposal = _copies(lambda: policy.propose(student_NU, key_N), student_NU.numel())
    of_draw = _copies(
        lambda: policy.draw(proposal, student_NU, teacher_NU, key_N), student_NU.numel()
    )
    assert PROPOSE_COPIES - 1 < of_proposal <= PROPOSE_COPIES + 0.2  # and some chunks of rows
    assert DRAW_COPIES[name] - 1.5 < of_draw <= DRAW_COPIES[name] + 0.2


def test_rollouts_have_room_for_a_round_of_all_slots(config_file: Path) -> None:
    """8 responses, not 256 slots; both models' logits and what the draw makes of them."""
    fp32 = ("training.precision=fp32", "rollout.max_response_tokens=16", "data.max_prompt_tokens=8")
    few = (
        *("training.prompts_per_step=2", "rollout.rollouts_per_prompt=4"),
        "rollout.max_prefill_tokens=1",
    )
    (need,) = _memory(config_file, 1, *fp32, *few, "rollout.keep_teacher_hidden=false")
    assert need.rollouts == 8 * 17 * 151_936 * (2 * 4 + 5 * 4)
    (none,) = _memory(config_file, 1, *fp32, *few, "behavior.kl_budget=0")
    assert none.rollouts == 8 * 151_936 * (4 + 2 * 4)


# ---------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[int, tuple[str, ...], str]] = {
    "ranks": (3, ("parallel.tensor_model_parallel_size=2",), "3 ranks cannot be divided"),
    "replicas": (
        512,
        ("training.prompts_per_step=64",),
        r"training\.prompts_per_step: a step of 256 responses",
    ),
    "heads": (
        3,
        ("parallel.tensor_model_parallel_size=3",),
        r"parallel\.tensor_model_parallel_size=3 does not divide num_attention_heads=16; "
        "sizes that fit both models: 1, 2, 4, 8, 16$",
    ),
    "layers": (
        32,
        ("parallel.pipeline_model_parallel_size=32",),
        r"parallel\.pipeline_model_parallel_size=32 exceeds the model's 28 layers",
    ),
    "positions": (
        1,
        ("rollout.max_response_tokens=40000",),
        r"data\.max_prompt_tokens \+ rollout\.max_response_tokens = 41024 exceeds",
    ),
    "evaluation": (
        1,
        (
            "evaluation.sets={math: {path: none.jsonl}}",
            "evaluation.max_response_tokens=40000",
        ),
        r"evaluation\.max_response_tokens = 41024 exceeds",
    ),
    "top-k": (1, ("loss.top_k=60",), r"loss\.top_k=60 exceeds the vocabulary of \d+ ids"),
    "cache": (1, ("rollout.cache_gb=1",), r"rollout\.cache_gb=1: one sequence of 8192 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_layout_is_refused(config_file: Path, case: str) -> None:
    world_size, overrides, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        plan_of(load_config(config_file, list(overrides)), world_size)
    assert "\n" not in str(caught.value)


TOO_LARGE: dict[str, tuple[float, tuple[str, ...], str]] = {
    "weights": (40, (), r"but training needs .* raise parallel\.tensor_model_parallel_size"),
    "activations": (
        60,
        ("training.max_tokens_per_microbatch=65536",),
        r"set training\.recompute_activations=true, or lower training\.max_tokens_per_microbatch",
    ),
    "plain optimizer": (
        30,
        ("optimizer.distributed=false", "parallel.tensor_model_parallel_size=2"),
        r"set optimizer\.distributed=true",
    ),
    "rollouts": (
        44,
        ("training.recompute_activations=true", "training.max_tokens_per_microbatch=8192"),
        r"but rollouts need .* sequence; set training\.teacher_hidden_device=host, or lower",
    ),
    "cache": (
        80,
        ("parallel.tensor_model_parallel_size=2", "rollout.cache_gb=70"),
        r"no room for a key/value cache of [\d.]+ GB on stage 0; set rollout\.cache_gb=[\d.]+ or",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_does_not_fit_is_refused(config_file: Path, case: str) -> None:
    memory_gb, overrides, message = TOO_LARGE[case]
    config = load_config(config_file, list(overrides))
    with pytest.raises(ConfigError, match=message) as caught:
        check_memory(plan_of(config, 4), config, int(memory_gb * GB))
    assert "\n" not in str(caught.value)


def test_advice_of_the_refused_cache_fits(config_file: Path) -> None:
    memory_gb, overrides, _ = TOO_LARGE["cache"]
    config = load_config(config_file, list(overrides))
    with pytest.raises(ConfigError) as caught:
        check_memory(plan_of(config, 4), config, int(memory_gb * GB))
    advised = re.search(r"set (rollout\.cache_gb=[\d.]+)", str(caught.value))
    assert advised is not None
    better = load_config(config_file, [*overrides, advised[1]])
    check_memory(plan_of(better, 4), better, int(memory_gb * GB))


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize("world_size", [4, 1024])
def test_report_stays_short(config_file: Path, world_size: int) -> None:
    overrides = [*layout_overrides(Layout(tp=2, pp=2)), "training.prompts_per_step=256"]
    config = load_config(config_file, overrides)
    sources = ModelSources.read(config, with_teacher=True)
    lines = describe_plan(make_plan(config, sources, world_size), sources, config)
    assert len(lines) < 30
    text = " ".join("\n".join(lines).split())
    for expected in (
        f"TP 2 x PP 2 x DP {world_size // 4} (rank r: tensor rank r % 2",
        "1,720,574,976 parameters, tied embeddings",
        "tensor rank t holds rows from 75,968 t to 75,968 (t + 1)",
        f"{world_size // 2:,}-{world_size - 1:,} 14-27 + output",
        "step: 256 prompts x 4 responses of up to 8,192 tokens = 8,388,608",
    ):
        assert expected in text


def test_report_names_what_aligns(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", eos_token_id=0)
    make_checkpoint(tmp_path / "chat", eos_token_id=[2, 0], vocab_size=72)
    config_file = write_inputs(tmp_path)
    config = load_config(
        config_file, [f"student.path={tmp_path}/base", f"teacher.path={tmp_path}/chat"]
    )
    sources = ModelSources.read(config, with_teacher=True)
    text = "\n".join(describe_plan(make_plan(config, sources, 1), sources, config))
    assert "stop ids: student [0], teacher [2, 0], merged into 0" in text
    assert "student 64 and teacher 72 rows, padded to 128" in text
