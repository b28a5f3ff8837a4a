"""Megatron's logits against transformers', at every layout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.layouts import LAYOUTS, PROBE_RESPONSES, Layout, ProbeResult, load_probe_prompts
from trb_megatron.huggingface.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def reference_logits(probe_config: Path) -> dict[str, list[torch.Tensor]]:
    folder = probe_config.parent
    prompts = load_probe_prompts(folder / "prompts.jsonl", load_tokenizer(folder / "student"))
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
