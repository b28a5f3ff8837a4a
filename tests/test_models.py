"""Megatron's logits against transformers', at every layout."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.layouts import LAYOUTS, PROBE_RESPONSES, Layout, ProbeResult
from tests.tiny import make_checkpoint
from trb_megatron.hf_checkpoint import CheckpointError
from trb_megatron.models import check_layout, padded_vocab_size, read_hf_config
from trb_megatron.prompts import load_prompts
from trb_megatron.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def reference_logits(probe_config: Path) -> dict[str, list[torch.Tensor]]:
    folder = probe_config.parent
    prompts = load_prompts(
        folder / "prompts.jsonl", load_tokenizer(folder / "student"), max_prompt_tokens=48
    ).prompts
    logits: dict[str, list[torch.Tensor]] = {}
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        for prompt, response in zip(prompts, PROBE_RESPONSES, strict=False):
            ids = torch.tensor([prompt.token_ids + response])
            with torch.no_grad():
                rows = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
            logits.setdefault(name, []).append(rows)
    return logits


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_logits_agree_with_transformers(
    probe_results: dict[Layout, ProbeResult],
    reference_logits: dict[str, list[torch.Tensor]],
    layout: Layout,
    name: str,
) -> None:
    for ours, theirs in zip(
        probe_results[layout].logits[name], reference_logits[name], strict=True
    ):
        hf_vocab_size = theirs.shape[-1]
        torch.testing.assert_close(ours[:, :hf_vocab_size], theirs, rtol=0, atol=1e-4)
        assert (ours[:, hf_vocab_size:] == 0).all()  # padded rows of the projection are zero


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
