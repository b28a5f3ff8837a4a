"""Changes of real configurations: refused by name, or with the logits of transformers."""

import json
import logging
import random
import shutil
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding
from transformers.utils import logging as transformers_logging

from tests.ranks import run_distributed
from trb_megatron.config.options import ParallelConfig
from trb_megatron.distributed.layout import ParallelLayout, initialize
from trb_megatron.huggingface.config import HFModelConfig, read_hf_config
from trb_megatron.huggingface.model_tensors import expected_tensors
from trb_megatron.huggingface.tensors import CheckpointError

NUM_CHANGES = 500
NUM_TOKENS = 40
MAX_PARAMETERS = 2_000_000  # logits are compared up to here, frequencies always

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vocab_size": 61,
}
# The keys of published configurations, with small sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 8,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 16,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "is_llama_config": True,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "Mistral-7B-v0.3": {
        **COMMON,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen2.5-0.5B": {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 64,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Qwen3-30B-A3B": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
}
ROTARY: dict[str, Any] = {
    "llama": LlamaRotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "qwen3_moe": Qwen3MoeRotaryEmbedding,
}
VALUES: list[Any] = [
    *[None, True, False, "text", "32", "", [], [1], [[2]], {}, {"a": 1}, 0, -1, 1, 2, 3, 7, 32],
    *[0.5, 1.0, 1e-6, 1e30, 10**9, 10**30, float("nan"), float("inf"), "full_attention", "silu"],
]
MORE_KEYS = (
    *["rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window"],
    *["head_dim", "quantization_config", "text_config", "per_layer_config", "attention_bias"],
    *["mlp_bias", "num_local_experts", "transformers_weights", "is_encoder_decoder", "dtype"],
    *["partial_rotary_factor", "original_max_position_embeddings", "max_window_layers"],
    *["auto_map", "num_labels", "id2label", "attn_implementation", "pad_token_id", "model_type"],
    *["mlp_only_layers", "qk_norm", "rope_type", "decoder", "compression_config"],
)
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "mamba", None)


class Outcome(NamedTuple):
    """What became of a changed configuration."""

    text: str
    is_accepted: bool
    problem: str  # empty where both agree, or where it is refused by name
    has_logits: bool


def _rope(rng: random.Random) -> dict[str, Any]:
    """Rope parameters, right or wrong."""
    rope = {
        rng.choice(["type", "rope_type"]): rng.choice(
            ["default", "linear", "llama3", "dynamic", "yarn", "longrope", "other", None, 2]
        ),
        "factor": rng.choice([1.0, 2, 4.0, 0.5, "2", None, -1, [2], 10**20]),
        "low_freq_factor": rng.choice([1.0, 1, 2.0, "1", None, 0]),
        "high_freq_factor": rng.choice([4.0, 4, 1.0, "4", None]),
        "original_max_position_embeddings": rng.choice([16, 32, 16.0, "16", None, 0]),
        "rope_theta": rng.choice([1e4, 500, 1_000_000.0, "1e4", None, 0, -2.0]),
        "partial_rotary_factor": rng.choice([1.0, 0.5, None]),
    }
    for key in rng.sample(sorted(rope), rng.randrange(len(rope))):
        del rope[key]
    return {"full_attention": rope} if rng.random() < 0.1 else rope


def _scatter(config: dict[str, Any], rng: random.Random) -> None:
    """Put a rope parameter beside the others, into them, or into both places with two values."""
    where = rng.choice(["rope_scaling", "rope_parameters"])
    if not config.get(where):
        config[where] = {"rope_type": "llama3", **LLAMA3}
    key = rng.choice([*LLAMA3, "rope_theta", "rope_type", "partial_rotary_factor"])
    if rng.random() < 0.5:
        config[where] = {**config[where], key: _rope_value(key, rng)}
    if rng.random() < 0.75:
        config[key] = _rope_value(key, rng)


def _rope_value(key: str, rng: random.Random) -> Any:
    """A value that a rope parameter may have."""
    values: dict[str, list[Any]] = {
        "rope_type": ["default", "linear", "llama3"],
        "factor": [2.0, 8.0],
        "low_freq_factor": [1.0, 2.0],
        "high_freq_factor": [4.0, 8.0],
        "original_max_position_embeddings": [16, 32],
        "rope_theta": [1e4, 500.0],
        "partial_rotary_factor": [1.0, 0.5],
    }
    return rng.choice(values[key])


def _change(config: dict[str, Any], rng: random.Random) -> None:
    kind = rng.random()
    if kind < 0.1:
        _scatter(config, rng)
    elif kind < 0.2:
        config.pop(rng.choice(sorted(config)), None)
    elif kind < 0.33:
        config[rng.choice(["rope_scaling", "rope_parameters"])] = _rope(rng)
    elif kind < 0.42:
        config["layer_types"] = [rng.choice(LAYER_TYPES) for _ in range(rng.choice([2, 2, 3]))]
    elif kind < 0.5:
        config |= {"sliding_window": rng.choice([8, 64, 128, None]), "use_sliding_window": True}
        config["max_window_layers"] = rng.choice([0, 1, 2, 3])
    elif kind < 0.6:
        key = rng.choice(["num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"])
        config[key] = rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 64, 128])
    else:
        config[rng.choice([*sorted(config), *MORE_KEYS])] = rng.choice(VALUES)


def _changed_text(number: int) -> str:
    """A changed config.json: by value or, one in ten, by its text."""
    rng = random.Random(number)
    config = dict(PUBLISHED[rng.choice(sorted(PUBLISHED))])
    for _ in range(rng.choice([1, 1, 2, 3])):
        _change(config, rng)
    text = json.dumps(config, indent=1)
    if number % 10 == 0:
        lines = text.splitlines()
        lines.insert(rng.randrange(1, len(lines)), rng.choice(lines))
        text = "\n".join(lines)
    elif number % 10 == 1:
        place = rng.randrange(len(text))
        text = (
            text[:place] + rng.choice(["", "0", "-", '"', "[", "}", ",", "e"]) + text[place + 1 :]
        )
    return text


def _disagreement(path: Path, ours: HFModelConfig, layout: ParallelLayout) -> tuple[str, bool]:
    """In what ours and transformers' model differ, and whether logits were compared."""
    from checkpoints_tools.verify_conversion import forward_logits
    from trb_megatron.models.build import build_model
    from trb_megatron.models.weights import load_hf_weights

    config = AutoConfig.from_pretrained(path)
    rotary = ROTARY[config.model_type](config)
    inv_freq = torch.tensor(ours.inv_freq)
    if inv_freq.shape != rotary.inv_freq.shape or rotary.attention_scaling != 1.0:
        return "rotary embedding", False
    if not torch.allclose(inv_freq, rotary.inv_freq, rtol=1e-6, atol=0):
        return "frequencies", False
    sizes = [torch.Size(shape).numel() for shape in expected_tensors(ours).values()]
    if sum(sizes) > MAX_PARAMETERS:
        return "", False
    torch.manual_seed(0)
    # Not what the folder asks for: fast kernels have limits on sizes.
    how: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    model = AutoModelForCausalLM.from_config(config, **how)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    model.save_pretrained(path / "saved")
    (path / "saved" / "model.safetensors").rename(path / "model.safetensors")
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, **how).eval()
    tokens = [token * 7 % ours.vocab_size for token in range(min(NUM_TOKENS, ours.max_positions))]
    built = build_model(ours, layout, vocab_size=ours.vocab_size, dtype=torch.float32).eval()
    load_hf_weights(built, ours, layout)
    logits_TV = forward_logits(built, tokens, layout)
    assert logits_TV is not None
    difference = (logits_TV - theirs(torch.tensor([tokens])).logits[0]).abs().max().item()
    return ("" if difference < 1e-3 else f"logits differ by {difference}"), True


@torch.no_grad()
def _try_all(folder: Path) -> list[Outcome]:
    layout = initialize(ParallelConfig())
    logging.getLogger("transformers").handlers.clear()
    transformers_logging.disable_progress_bar()
    outcomes = []
    for number in range(NUM_CHANGES):
        text, path = _changed_text(number), folder / str(number)
        path.mkdir()
        (path / "config.json").write_text(text)
        try:
            ours = read_hf_config(path)
        except CheckpointError as error:
            says = str(error)
            is_named = says.startswith(f"{path}/config.json: ") and "\n" not in says
            outcomes.append(Outcome(text, False, "" if is_named else says, False))
            continue
        except Exception as error:
            outcomes.append(Outcome(text, False, f"traceback: {error!r}", False))
            continue
        try:
            problem, has_logits = _disagreement(path, ours, layout)
        except Exception as error:
            problem, has_logits = f"cannot be computed: {error!r}", False
        outcomes.append(Outcome(text, True, problem, has_logits))
        shutil.rmtree(path)
    return outcomes


def test_changed_configurations_agree_with_transformers_or_are_refused_by_name(
    tmp_path: Path,
) -> None:
    outcomes = run_distributed(_try_all, 1, tmp_path, timeout_s=400)[0]
    problems = [(o.problem, o.text) for o in outcomes if o.problem]
    assert not problems, "\n\n".join("\n".join(problem) for problem in problems)
    counts = Counter((o.is_accepted, o.has_logits) for o in outcomes)
    print(
        f"{len(outcomes)} changes: {counts[False, False]} refused, {counts[True, True]} with the "
        f"logits of transformers, {counts[True, False]} with its frequencies"
    )
    assert counts[False, False] > 100 and counts[True, True] > 100


# ---------------------------------------------------------------- keys that nobody lists

ELSEWHERE: tuple[Any, ...] = (False, True, 3, "text")


@torch.no_grad()
def _their_logits(config: Any, weights: dict[str, Tensor] | None) -> tuple[Tensor, Any]:
    """transformers' logits with these weights, or random ones, and its model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if weights is None:
        for parameter in model.parameters():
            parameter.data.uniform_(-0.5, 0.5)
    else:
        model.load_state_dict(weights)
    return model(torch.arange(NUM_TOKENS)[None] * 7 % config.vocab_size, return_dict=True)[0], model


def _names_read(config: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of values that transformers looks for while it builds and runs a model."""
    names: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def read(self: PreTrainedConfig, name: str) -> Any:
        names.add(name)
        return plain(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedConfig, "__getattribute__", read)
        _their_logits(config, None)
    return {
        name
        for name in names
        if not name.startswith("__") and not callable(getattr(type(config), name, None))
    }


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_no_key_that_transformers_looks_for_changes_a_model_in_silence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no class lists, and that is read where it happens to be there."""
    published, file = PUBLISHED[name], tmp_path / "config.json"
    file.write_text(json.dumps(published))
    base = AutoConfig.from_pretrained(tmp_path)
    names = _names_read(base, monkeypatch)
    assert {"is_causal", "hidden_size", "rope_parameters"} <= names
    expected_TV, model = _their_logits(base, None)
    ours, num_refused, wrong = read_hf_config(tmp_path), 0, []
    for key, value in product(sorted(names - set(published)), ELSEWHERE):
        file.write_text(json.dumps({**published, key: value}))
        try:
            changed = read_hf_config(tmp_path)
        except CheckpointError as error:
            assert str(error).startswith(f"{file}: ")
            num_refused += 1
            continue
        try:
            theirs = AutoConfig.from_pretrained(tmp_path)
            logits_TV, now = _their_logits(theirs, model.state_dict())
        except Exception:  # transformers does not load it in silence
            continue
        inv_freq = now.model.rotary_emb.inv_freq
        is_same = torch.equal(logits_TV, expected_TV) if changed == ours else True
        if not is_same or not torch.allclose(torch.tensor(changed.inv_freq), inv_freq):
            wrong.append((key, value))
    assert not wrong
    assert num_refused > 0
