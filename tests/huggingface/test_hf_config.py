"""Reading HF configurations: what is supported, and layouts that don't fit."""

import json
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint
from trb_megatron.huggingface.config import (
    check_layout,
    layers_of_stages,
    padded_vocab_size,
    read_hf_config,
)
from trb_megatron.huggingface.tensors import CheckpointError


@pytest.mark.parametrize(("tp", "expected"), [(1, 152064), (2, 152064), (4, 152064), (3, 152064)])
def test_padded_vocabulary_is_common(tp: int, expected: int) -> None:
    assert padded_vocab_size([151936, 152064], tp) == expected
    assert padded_vocab_size([200], tp) % tp == 0


def _edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model_type": "gpt_neox"},
            "gpt_neox.*supported: llama, mistral, qwen2, qwen3",
        ),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights .*gptq"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type 'yarn'",
        ),
    ],
)
def test_unsupported_config_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    make_checkpoint(tmp_path)
    _edit_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(tmp_path)


def test_missing_and_broken_config_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_hf_config(tmp_path)


def test_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = read_hf_config(make_checkpoint(tmp_path))
    check_layout(config, 2, 2)
    with pytest.raises(ValueError, match=r"=3 does not divide num_attention_heads=4"):
        check_layout(config, 3, 1)
    with pytest.raises(ValueError, match=r"=4 does not divide num_key_value_heads=2"):
        check_layout(config, 4, 1)
    with pytest.raises(ValueError, match=r"=3 exceeds the model's 2 layers"):
        check_layout(config, 1, 3)


@pytest.mark.parametrize(("num_layers", "pp"), [(1, 1), (8, 4), (7, 2), (9, 4), (5, 5)])
def test_layers_of_stages_are_a_partition_in_order(num_layers: int, pp: int) -> None:
    stages = layers_of_stages(num_layers, pp)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    lengths = [len(stage) for stage in stages]
    assert len(lengths) == pp
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1
