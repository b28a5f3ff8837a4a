"""Every token of the speculative engine follows its policy exactly, at every place of a round.

The models are real checkpoints through the real engine, but know their last token alone: attention
and MLP add nothing, embeddings are one-hot, and so the columns of the output layer are any table of
next-token logits that a test likes. Each of the NUM_IDS ids is thus a pair of distributions,
p(.|id) and q(.|id), and long responses visit all pairs at all places of a round.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.ranks import run_distributed
from tests.reference import DenseBehavior, dense_blend, dense_skd, dense_teacher
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.uniforms import Purpose

NUM_IDS, NUM_ROWS = 8, 10  # the last two rows are padding
DRAFTS = 2
PLACES = {"first": 0, "middle": 1, "bonus": 2}
RESPONSE_TOKENS = 51  # places are counted up to the last round that may have been cut short
NUM_RESPONSES = {"wide": 36_000, "narrow": 4_096, "skd": 8_192, "teacher": 8_192}
NUM_COMPARED = 2_048  # responses that two ranks draw, too
NUM_MUTANT_RESPONSES = 2_048
WIDE, NARROW = 1.25, 0.02  # KL budgets
TOP_K, TEACHER_TEMPERATURE = 3, 0.6

# Of each pair: ids that the teacher favors, their mass under the student, and by which log-ratio.
FAVORS = (
    ((5, 7), 0.16, 6.0),
    ((0, 4), 0.02, 8.0),
    ((7,), 0.003, 8.0),
    ((1, 6), 0.3, 0.7),
    ((3, 6, 7), 0.3, 0.35),
    ((2, 4, 7), 0.4, 0.25),
    ((2, 7), 0.2, 0.3),
    ((3, 6), 0.4, 0.045),
)

Counts = np.ndarray
"""[place, pair, next id]: how often each id was drawn."""


class Drawn(NamedTuple):
    """What a policy drew, and the tokens [S, T] of its first `NUM_COMPARED` responses."""

    drawn: Counts
    kept: Counts
    """Of the draws, those that accepted the proposal."""
    first_ST: np.ndarray


def build_tables() -> tuple[Tensor, Tensor]:
    """Next-token logits [last id, next id] of student and teacher, float64.

    This seed (and the favored ids) let all pairs be visited about equally often at all places.
    """
    generator = torch.Generator().manual_seed(8254)
    student_VV = 0.4 * torch.randn(NUM_IDS, NUM_IDS, generator=generator).double()
    noise_VV = torch.randn(NUM_IDS, NUM_IDS, generator=generator).double()
    teacher_VV = torch.empty_like(student_VV)
    for pair, (ids, mass, log_ratio) in enumerate(FAVORS):
        favored = torch.zeros(NUM_IDS, dtype=torch.bool)
        favored[list(ids)] = True
        weights = student_VV[pair].exp()
        p = torch.where(
            favored,
            mass * weights / weights[favored].sum(),
            (1 - mass) * weights / weights[~favored].sum(),
        )
        student_VV[pair] = p.log()
        teacher_VV[pair] = p.log() + log_ratio * favored + min(0.1, log_ratio / 5) * noise_VV[pair]
    return student_VV, teacher_VV


STUDENT_VV, TEACHER_VV = build_tables()
EXPECTED: dict[str, DenseBehavior] = {
    "wide": dense_blend(STUDENT_VV, TEACHER_VV, torch.full((NUM_IDS,), WIDE).double()),
    "narrow": dense_blend(STUDENT_VV, TEACHER_VV, torch.full((NUM_IDS,), NARROW).double()),
    "skd": dense_skd(STUDENT_VV, TEACHER_VV, TEACHER_VV / TEACHER_TEMPERATURE, TOP_K),
    "teacher": dense_teacher(STUDENT_VV, TEACHER_VV),
}


def acceptance_of_pairs(policy: str) -> Tensor:
    """1 - TV(p, mu) of each pair."""
    p_VV, mu_VV = STUDENT_VV.softmax(-1), EXPECTED[policy].logprobs.exp()
    return torch.minimum(p_VV, mu_VV).sum(-1)


def make_table_checkpoint(path: Path, logits_VV: Tensor) -> None:
    """Write a checkpoint whose next-token logits are a row of the table, chosen by the last id."""
    config = Qwen3Config(
        vocab_size=NUM_IDS,
        hidden_size=NUM_IDS,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.fill_(1.0 if parameter.dim() == 1 else 0.0)
    model.model.embed_tokens.weight.data.copy_(torch.eye(NUM_IDS))
    # The final norm makes a one-hot vector this large.
    height = (1 / NUM_IDS + config.rms_norm_eps) ** -0.5
    model.lm_head.weight.data.copy_(logits_VV.T / height)
    model.save_pretrained(path)


# Wrong rules, each to be noticed; they stand in for functions of `coupling` on one rank.


def _always_accept(student_N: Tensor, behavior_N: Tensor, u_accept_N: Tensor) -> Tensor:
    return torch.ones_like(student_N, dtype=torch.bool)


def _accept_by_the_inverse(student_N: Tensor, behavior_N: Tensor, u_accept_N: Tensor) -> Tensor:
    return u_accept_N < (student_N - behavior_N).double().exp()


def _accept_too_often(student_N: Tensor, behavior_N: Tensor, u_accept_N: Tensor) -> Tensor:
    return u_accept_N <= (behavior_N - student_N).double().exp() + 0.05


def _teacher_for_residual(
    student_NU: Tensor, behavior_NU: Tensor, proposed_N: Tensor, key_N: Tensor, *, tp_group: Any
) -> Tensor:
    from trb_megatron.behavior.sampling import sample_weights

    # Which pair a row belongs to shows in the student's distribution.
    student_VV = STUDENT_VV.log_softmax(-1).float()
    pair_N = torch.cdist(student_NU[:, :NUM_IDS], student_VV).argmin(dim=-1)
    weights_NV = TEACHER_VV.softmax(-1)[pair_N]
    return sample_weights(weights_NV, key_N, Purpose.RESIDUAL, tp_group=tp_group)


def _behavior_for_residual(
    student_NU: Tensor, behavior_NU: Tensor, proposed_N: Tensor, key_N: Tensor, *, tp_group: Any
) -> Tensor:
    from trb_megatron.behavior.sampling import sample_weights

    return sample_weights(behavior_NU.exp(), key_N, Purpose.RESIDUAL, tp_group=tp_group)


MUTANTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "always accept": ("accept_tokens", _always_accept),
    "accept by the inverse ratio": ("accept_tokens", _accept_by_the_inverse),
    "accept too often": ("accept_tokens", _accept_too_often),
    "teacher in place of the residual": ("sample_residual", _teacher_for_residual),
    "behavior in place of the residual": ("sample_residual", _behavior_for_residual),
}


def count_by_place(rollouts: Sequence[Any]) -> Drawn:
    """How often each id was drawn, and how often it was the proposal; [place, pair, next id].

    A round ends with the first token that is not the proposal, or with the bonus.
    """
    ids_ST = np.array([rollout.response_ids for rollout in rollouts])
    accepted_ST = torch.stack([rollout.record.accepted for rollout in rollouts]).numpy()
    drawn = np.zeros((len(PLACES), NUM_IDS, NUM_IDS), dtype=np.int64)
    kept = np.zeros_like(drawn)
    pair_S = np.array([rollout.prompt_ids[-1] for rollout in rollouts])
    place_S = np.zeros_like(pair_S)
    for position in range(RESPONSE_TOKENS - DRAFTS):
        id_S, accepted_S = ids_ST[:, position], accepted_ST[:, position]
        np.add.at(drawn, (place_S, pair_S, id_S), 1)
        np.add.at(kept, (place_S, pair_S, id_S), accepted_S)
        place_S = np.where(accepted_S & (place_S < DRAFTS), place_S + 1, 0)
        pair_S = id_S
    return Drawn(drawn, kept, ids_ST[:NUM_COMPARED])


def _sample(folder: Path) -> dict[str, Drawn]:
    """Draws of every policy: all on one rank, with every mutant of the wide blend; some on two."""
    gc.disable()  # there are millions of small objects, and no cycles among them
    from trb_megatron.config.options import ParallelConfig, RolloutConfig
    from trb_megatron.distributed.layout import initialize

    num_ranks = torch.distributed.get_world_size()
    layout = initialize(ParallelConfig(tensor_model_parallel_size=num_ranks))

    from trb_megatron.behavior.policies import BlendPolicy, SKDPolicy, TeacherPolicy
    from trb_megatron.behavior.stop_alignment import StopAlignment
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights
    from trb_megatron.rollout.engine import RolloutEngine
    from trb_megatron.rollout.sequences import Request, ResponseSpec

    models = []
    for name in ("student", "teacher"):
        config = read_hf_config(folder / name)
        model = build_model(config, layout, vocab_size=NUM_ROWS, dtype=torch.float32)
        load_hf_weights(model, config, layout)
        models.append(model.eval().requires_grad_(False))
    spec = ResponseSpec(max_response_tokens=RESPONSE_TOKENS, stop_ids=(), seed=6, step=0)
    shared: Any = {
        "temperature": 1.0,
        "num_valid": NUM_IDS,
        "alignment": StopAlignment((0,), (0,)),
        "tp_group": layout.tp_group,
    }
    policies = {
        "wide": BlendPolicy(kl_budget=WIDE, **shared),
        "narrow": BlendPolicy(kl_budget=NARROW, **shared),
        "skd": SKDPolicy(top_k=TOP_K, teacher_temperature=TEACHER_TEMPERATURE, **shared),
        "teacher": TeacherPolicy(**shared),
    }
    settings = RolloutConfig(
        max_sequences=8192, page_tokens=16, draft_tokens=DRAFTS, keep_teacher_hidden=False
    )
    engine = RolloutEngine(models[0], models[1], layout, settings)

    def count(policy: str, num_responses: int) -> Drawn:
        requests = [Request(i, 0, (i % NUM_IDS,)) for i in range(num_responses)]
        return count_by_place(engine.generate(requests, policies[policy], spec))

    if num_ranks > 1:
        return {policy: count(policy, NUM_COMPARED) for policy in NUM_RESPONSES}
    counts = {policy: count(policy, number) for policy, number in NUM_RESPONSES.items()}
    for name, (function, mutant) in MUTANTS.items():
        with mock.patch(f"trb_megatron.behavior.coupling.{function}", mutant):
            counts[name] = count("wide", NUM_MUTANT_RESPONSES)
    return counts


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Drawn]]:
    """Of one and of two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("law")
    make_table_checkpoint(folder / "student", STUDENT_VV)
    make_table_checkpoint(folder / "teacher", TEACHER_VV)
    return {tp: run_distributed(_sample, tp, folder, timeout_s=400)[0] for tp in (1, 2)}


def p_values(drawn: Counts, policy: str) -> np.ndarray:
    """Chi-square tests of `drawn` against mu of the policy, [place, pair]."""
    mu_VV = EXPECTED[policy].logprobs.exp().numpy()
    return np.array([[_p_value(*row) for row in zip(of, mu_VV, strict=True)] for of in drawn])


def _p_value(drawn_V: np.ndarray, mu_V: np.ndarray) -> float:
    expected_V = mu_V * drawn_V.sum()
    # Rare ids are counted together, as the chi-square approximation asks.
    is_rare_V = expected_V < 10
    drawn = np.append(drawn_V[~is_rare_V], drawn_V[is_rare_V].sum())
    expected = np.append(expected_V[~is_rare_V], expected_V[is_rare_V].sum())
    kept = expected >= 1
    scale = drawn[kept].sum() / expected[kept].sum()
    return float(chisquare(drawn[kept], scale * expected[kept]).pvalue)


def test_pairs_span_the_acceptances_that_matter() -> None:
    acceptance = acceptance_of_pairs("wide").sort().values
    assert acceptance[0] < 0.3 and acceptance[-1] > 0.985
    assert (acceptance.diff() < 0.25).all()
    # Blends strictly between the models under either budget, and teachers within it.
    for policy in ("wide", "narrow"):
        coef_V = EXPECTED[policy].blend_coef
        assert ((coef_V > 0.05) & (coef_V < 0.95)).sum() >= 3 and (coef_V == 1).any()


@pytest.mark.parametrize("place", PLACES)
def test_tokens_at_every_place_of_a_round_follow_the_blend(
    counts: dict[int, dict[str, Drawn]], place: str
) -> None:
    drawn = counts[1]["wide"].drawn[[PLACES[place]]]
    assert (drawn.sum(axis=-1) >= 50_000).all()
    assert (p_values(drawn, "wide") > 1e-3).all()


@pytest.mark.parametrize("policy", ["narrow", "skd", "teacher"])
def test_tokens_follow_the_policy(counts: dict[int, dict[str, Drawn]], policy: str) -> None:
    drawn = counts[1][policy].drawn
    num_draws = drawn.sum(axis=(0, 2))
    assert (num_draws >= 10_000).all() and (policy == "narrow" or (num_draws > 50_000).sum() >= 3)
    assert (p_values(drawn.sum(axis=0, keepdims=True), policy) > 1e-3).all()
    assert (p_values(drawn, policy) > 1e-3).all()


@pytest.mark.parametrize("policy", NUM_RESPONSES)
def test_acceptance_is_one_minus_the_total_variation(
    counts: dict[int, dict[str, Drawn]], policy: str
) -> None:
    expected_V = acceptance_of_pairs(policy).numpy()
    drawn, kept = (count.sum(axis=-1) for count in counts[1][policy][:2])
    deviation = np.sqrt(expected_V * (1 - expected_V) / drawn)
    assert (np.abs(kept / drawn - expected_V) < 4 * deviation + 1e-9).all()


@pytest.mark.parametrize("policy", NUM_RESPONSES)
def test_tokens_do_not_depend_on_tensor_parallelism(
    counts: dict[int, dict[str, Drawn]], policy: str
) -> None:
    one_ST, two_ST = (counts[tp][policy].first_ST for tp in (1, 2))
    # Where rounding puts a random number on a boundary, the rest of a response is another one.
    assert one_ST.size > 100_000 and (one_ST != two_ST).mean() < 1e-3


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_rule_is_noticed(counts: dict[int, dict[str, Drawn]], mutant: str) -> None:
    assert p_values(counts[1][mutant].drawn, "wide").min() < 1e-9
