"""Reading HF configurations: what is supported, and layouts that don't fit."""

import json
from dataclasses import replace
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
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "max_window_layers": 1,
                "layer_types": None,
            },
            "sliding_window = 64",
        ),
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


def test_window_that_no_layer_uses_is_no_window(tmp_path: Path) -> None:
    """The layers from `max_window_layers` on have it, and there are two."""
    make_checkpoint(tmp_path)
    window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}
    _edit_config(tmp_path, **window, max_window_layers=2)
    assert read_hf_config(tmp_path).num_layers == 2


def test_missing_and_broken_config_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_hf_config(tmp_path)


def test_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = read_hf_config(make_checkpoint(tmp_path))
    for tp in (1, 2, 4):
        check_layout([config], tp, 2)
    with pytest.raises(ValueError, match=r"=3 does not divide num_attention_heads=4; sizes that f"):
        check_layout([config], 3, 1)
    with pytest.raises(ValueError, match=r"=3 exceeds the model's 2 layers"):
        check_layout([config], 1, 3)


@pytest.mark.parametrize(
    ("sizes", "fitting"),
    [
        # SmolLM2-135M
        ({"num_attention_heads": 9, "num_query_groups": 3, "ffn_hidden_size": 1536}, [1, 3]),
        # Qwen2.5-0.5B
        ({"num_attention_heads": 14, "num_query_groups": 2, "ffn_hidden_size": 4864}, [1, 2]),
        # Qwen3-1.7B
        ({"num_attention_heads": 16, "num_query_groups": 8}, [1, 2, 4, 8, 16]),
        # 3, 6: neither divides 4 nor the other way round; 12: does not divide 20 heads * 128 rows.
        ({"num_attention_heads": 12, "num_query_groups": 4}, [1, 2, 4]),
        ({"num_attention_heads": 12, "num_query_groups": 4, "head_dim": 96}, [1, 2, 4, 12]),
        ({"num_attention_heads": 12, "num_query_groups": 12, "num_experts": 8}, [1, 2, 4]),
    ],
    ids=str,
)
def test_sizes_that_fit_a_model_are_listed(
    tmp_path: Path, sizes: dict[str, int], fitting: list[int]
) -> None:
    tiny = read_hf_config(make_checkpoint(tmp_path))
    defaults = {"head_dim": 128, "ffn_hidden_size": 6144}
    experts = {"expert_ffn_hidden_size": 512} if "num_experts" in sizes else {}
    config = replace(tiny, **{**defaults, **experts, **sizes})  # type: ignore[arg-type]
    listed = f"sizes that fit: {', '.join(map(str, fitting))}"
    for tp in range(1, 2 * config.num_attention_heads + 1):
        if tp in fitting:
            check_layout([config], tp, 1)
            continue
        with pytest.raises(ValueError) as caught:
            check_layout([config], tp, 1)
        assert str(caught.value).startswith(f"{tmp_path}: parallel.tensor_model_parallel_size={tp}")
        assert str(caught.value).endswith(listed)


def test_sizes_that_fit_a_pair_fit_both(tmp_path: Path) -> None:
    tiny = read_hf_config(make_checkpoint(tmp_path))
    student = replace(tiny, num_attention_heads=12, num_query_groups=12, ffn_hidden_size=96)
    teacher = replace(tiny, num_attention_heads=8, num_query_groups=1, path=tmp_path / "teacher")
    with pytest.raises(
        ValueError,
        match=r"teacher: -t=12 does not divide num_attention_heads=8; sizes that fit both models: "
        "1, 2, 4$",
    ):
        check_layout([student, teacher], 12, 1, ("-t", "-p"))


@pytest.mark.parametrize(("num_layers", "pp"), [(1, 1), (8, 4), (7, 2), (9, 4), (5, 5)])
def test_layers_of_stages_are_a_partition_in_order(num_layers: int, pp: int) -> None:
    stages = layers_of_stages(num_layers, pp)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    lengths = [len(stage) for stage in stages]
    assert len(lengths) == pp
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1
