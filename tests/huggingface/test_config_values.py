"""Broken JSON files of a model folder are refused by file, key and value."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_checkpoint
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.tensors import CheckpointError

NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        read_hf_config(folder)
    message = str(refused.value)
    assert message.startswith(str(folder)) and "\n" not in message
    return message.removeprefix(f"{folder}/")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_size": -32}, "hidden_size is -32; expected an integer from 1 to"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer from 1 to 10,000"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; expected"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true; expected an integer"),
        ({"num_attention_heads": [4]}, "num_attention_heads is [4]; expected an integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads"),
        ({"head_dim": "8"}, 'head_dim is "8"; expected an integer'),
        ({"head_dim": 3}, "head_dim=3, of hidden_size=32"),
        ({"vocab_size": None}, "vocab_size is null; expected an integer"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps is "1e-6"; expected a number from 0 to 1'),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings is "false"; expected true or'),
        ({"rope_theta": "10000"}, 'rope_theta is "10000"; expected a number above 0'),
        ({"rope_theta": None}, "rope_theta is null; expected a number above 0"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear"; expected a mapping, or null'),
        ({"rope_scaling": [2]}, "rope_scaling is [2]; expected a mapping"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            'rope_scaling.factor is "2"; expected a number of at least 1',
        ),
        ({"rope_scaling": {"rope_type": None}}, "rope_scaling.rope_type is null; expected text"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta is -1; expected"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters`"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}},
            "'low_freq_factor'",
        ),
        (
            {"rope_parameters": NESTED, "layer_types": ["full_attention"] * 2},
            "rope_parameters has parameters for full_attention of their own",
        ),
        ({"quantization_config": "awq"}, 'quantised weights (quantization_config, "awq")'),
        (
            {"text_config": {"hidden_size": 32}},
            'text_config is {"hidden_size": 32}: a model inside',
        ),
        ({"per_layer_config": {"0": {}}}, "layers of different sizes, which is not supported"),
        ({"transformers_weights": "other.safetensors"}, "weights in another file"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types with sliding_attention is not supported",
        ),
        ({"layer_types": ["full_attention"] * 3}, "must be equal to the number of `layer_types`"),
        ({"layer_types": "full_attention"}, "layer_types is"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "reads a mistral model"),
        ({"hidden_act": ["silu"]}, 'hidden_act is ["silu"]; expected text'),
        ({"pad_token_id": 64}, "pad_token_id=64 is not in the vocabulary of 64"),
        ({"is_causal": False}, "is_causal is false; expected true, or no such key: a model whose"),
        ({"is_causal": None}, "is_causal is null; expected true"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is not supported"),
    ],
    ids=str,
)
def test_values_of_a_configuration_are_named(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    if "layer_types" not in values:
        del config["layer_types"]
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    said = refusal(folder)
    assert said.startswith("config.json: ") and message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 32, "hidden_size": 64}', "the key 'hidden_size' stands twice"),
        ('{"rope_theta": NaN}', "rope_theta is nan, which is no number"),
        ('{"sizes": [1, -Infinity]}', "sizes is -inf, which is no number"),
        ('{"rope_theta": 1e999}', "rope_theta is inf, which is no number"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ("\ufeff{}", "not valid JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_json_that_readers_disagree_on_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    said = refusal(folder)
    assert said.startswith("config.json: ") and message in said


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("generation_config.json", {"eos_token_id": "2"}, 'eos_token_id is "2"; expected a token'),
        ("generation_config.json", {"eos_token_id": [[0]]}, "eos_token_id is [[0]]"),
        ("generation_config.json", {"eos_token_id": 2.0}, "eos_token_id is 2.0"),
        ("generation_config.json", {"eos_token_id": [0, None]}, "eos_token_id is [0, null]"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id is true"),
        ("tokenizer_config.json", {"eos_token": 2}, "eos_token is 2; expected text, a token with"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, 'chat_template is ["x"]; expected'),
        ("tokenizer_config.json", {"model_max_length": "8k"}, 'model_max_length is "8k"'),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "tokenizer_class is 5; expected text"),
        ("special_tokens_map.json", {"pad_token": ["x"]}, 'pad_token is ["x"]'),
    ],
)
def test_values_beside_the_configuration_are_named(
    folder: Path, file: str, values: dict[str, Any], message: str
) -> None:
    (folder / file).write_text(json.dumps(values))
    said = refusal(folder)
    assert said.startswith(f"{file}: {message}")


def test_what_transformers_has_defaults_for_may_be_absent(folder: Path) -> None:
    """Those of the family's class."""
    names = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in names}))
    read = read_hf_config(folder)
    assert (read.num_layers, read.head_dim, read.vocab_size) == (32, 128, 151_936)
    assert (read.tied_embeddings, read.norm_epsilon, read.max_positions) == (False, 1e-6, 32_768)
    assert read.inv_freq[1] == pytest.approx(10_000 ** (-2 / 128))
