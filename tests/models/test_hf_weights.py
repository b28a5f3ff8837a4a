"""HF checkpoints in and out: what is exported is what was trained, and bad files are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.layouts import (
    LAYOUTS,
    ONE_RANK,
    PROBE_RESPONSES,
    Layout,
    ProbeResult,
    load_probe_prompts,
)
from tests.tiny import make_checkpoint
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.model_tensors import expected_tensors, open_model
from trb_megatron.huggingface.param_mapping import map_params
from trb_megatron.huggingface.tensors import INDEX_FILE, CheckpointError, HFTensors
from trb_megatron.huggingface.tokenizer import load_tokenizer


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_exported_student_gives_the_logits_of_the_trained_one(
    probe_results: dict[Layout, ProbeResult], probe_config: Path, layout: Layout
) -> None:
    export = probe_results[layout].export
    model = AutoModelForCausalLM.from_pretrained(export).eval()
    prompts = load_probe_prompts(probe_config.parent / "prompts.jsonl", load_tokenizer(export))
    for prompt, response, ours in zip(
        prompts, PROBE_RESPONSES, probe_results[layout].logits["trained"], strict=False
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt.token_ids + response])).logits
        theirs = logits[0, len(prompt.token_ids) - 1 : -1]
        torch.testing.assert_close(ours[:, : theirs.shape[-1]], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_training_gives_the_same_weights_at_every_layout(
    probe_results: dict[Layout, ProbeResult], layout: Layout
) -> None:
    one = AutoModelForCausalLM.from_pretrained(probe_results[ONE_RANK].export).state_dict()
    other = AutoModelForCausalLM.from_pretrained(probe_results[layout].export).state_dict()
    for name, weight in one.items():
        # Adam turns rounding of a near-zero gradient into a visible step of single weights (three
        # steps of 1e-3 here), so the mean is what tells a wrong gradient from rounding.
        difference = (weight - other[name]).abs()
        assert difference.mean() < 1e-6 and difference.max() < 1e-3, name


def test_export_keeps_config_tokenizer_and_generation_config(
    probe_results: dict[Layout, ProbeResult], probe_config: Path
) -> None:
    source, export = probe_config.parent / "student", probe_results[ONE_RANK].export
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (export / name).read_bytes() == (source / name).read_bytes()
    assert set(load_file(export / "model.safetensors")) == set(
        load_file(source / "model.safetensors")
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_mapping_reads_shards_and_joins_them_exactly(
    tmp_path: Path, tp: int, num_groups: int, tied: bool
) -> None:
    config = read_hf_config(
        make_checkpoint(tmp_path, num_groups=num_groups, tied=tied, vocab_size=61)
    )
    tensors = HFTensors(tmp_path)
    rebuilt: dict[str, torch.Tensor] = {}
    for param in map_params(config.family, config.shape(128)).values():
        hf = [tensors.slice(name) for name in param.hf_names]
        rebuilt |= param.join_shards([param.read_shard(hf, rank, tp) for rank in range(tp)])
    original = load_file(tmp_path / "model.safetensors")
    assert set(rebuilt) == set(original)
    for name, tensor in original.items():
        assert torch.equal(rebuilt[name], tensor), name


def test_grouped_qkv_layout_is_megatrons(tmp_path: Path) -> None:
    """Rows by query group: its query heads, key head and value head (4 heads, 2 groups of 8)."""
    config = read_hf_config(make_checkpoint(tmp_path))
    param = map_params(config.family, config.shape(128))[
        "decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    q, k, v = (HFTensors(tmp_path).slice(name)[:] for name in param.hf_names)
    expected = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
    for tp in (1, 2, 4):
        for rank, rows in enumerate(expected.chunk(tp)):
            assert torch.equal(param.read_shard([q, k, v], rank, tp), rows)


def _sharded(folder: Path) -> Path:
    """Split a single-file checkpoint in two with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def test_sharded_checkpoint_reads_like_a_single_file(tmp_path: Path) -> None:
    single = make_checkpoint(tmp_path / "single")
    sharded = HFTensors(_sharded(make_checkpoint(tmp_path / "sharded")))
    for name, tensor in load_file(single / "model.safetensors").items():
        assert torch.equal(sharded.slice(name)[:], tensor)


def test_bad_files_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "truncated")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
        HFTensors(folder)

    folder = _sharded(make_checkpoint(tmp_path / "missing"))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: no such file"):
        HFTensors(folder)

    folder = make_checkpoint(tmp_path / "no weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        HFTensors(folder)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    config = read_hf_config(make_checkpoint(tmp_path))
    tensors, warnings = open_model(config)
    assert tensors.names == set(expected_tensors(config)) and not warnings
    with pytest.raises(
        CheckpointError, match=r"1 of the model's 25 tensors are missing: lm_head\.weight"
    ):
        open_model(replace(config, tied_embeddings=False))
    with pytest.raises(CheckpointError, match=r"q_norm\.weight has shape \[8\], .* \[4\]"):
        open_model(replace(config, head_dim=4, num_attention_heads=8, num_query_groups=4))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor w has type I8"):
        HFTensors(tmp_path).dtypes(["w"])
