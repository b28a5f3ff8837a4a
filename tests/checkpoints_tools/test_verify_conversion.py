"""verify_conversion says that a right conversion holds and that a wrong one does not."""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import hf_to_megatron, verify_conversion
from checkpoints_tools.verify_conversion import Comparison, Continued, Errors
from tests.changed_weights import CHANGES, NUM_LAYERS, Folder
from tests.families import make_family_checkpoint
from tests.ranks import run_distributed
from trb_megatron.config.options import ParallelConfig
from trb_megatron.distributed.layout import initialize
from trb_megatron.huggingface.tensors import CheckpointError

OPTIONS = ("--new-tokens", "4")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    source = make_family_checkpoint(folder / "hf", "qwen2", max_position_embeddings=64)
    hf_to_megatron.main([str(source), str(folder / "megatron")])
    # A conversion with a fault: one layer's key and value have changed places.
    wrong = make_family_checkpoint(folder / "wrong-hf", "qwen2", max_position_embeddings=64)
    tensors = load_file(wrong / "model.safetensors")
    names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "kv"]
    tensors |= dict(zip(names, [tensors[name] for name in reversed(names)], strict=True))
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron.main([str(wrong), str(folder / "wrong")])
    return source


def _verify(arguments: tuple[str, ...]) -> int:
    """Exit status of the command on this rank."""
    try:
        verify_conversion.main(list(arguments))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    return 0


def _verify_all(commands: list[tuple[str, ...]]) -> list[int]:
    """One job for all commands, which would each begin and end one of their own."""
    layout = initialize(
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    )
    with (
        mock.patch.object(verify_conversion, "initialize", lambda config: layout),
        mock.patch.object(verify_conversion, "shutdown"),
    ):
        return [_verify(command) for command in commands]


@pytest.fixture(scope="module")
def statuses(source: Path) -> dict[str, list[int]]:
    """Exit status of each case on each of four ranks, all in one job."""
    layout = ("--tensor-parallel", "2", "--pipeline-parallel", "2")
    prompts = source.parent / "prompts.txt"
    prompts.write_text("1+2=\n\nx\n")
    common = (str(source), *layout, *OPTIONS)
    cases = {
        "hf": (*common, "--json", str(source.parent / "hf.json")),
        "megatron": (*common, "--megatron", str(source.parent / "megatron")),
        "prompts": (*common, "--prompts", str(prompts)),
        "wrong": (*common, "--megatron", str(source.parent / "wrong")),
        "bf16": (*common, "--precision", "bf16"),
        "wrong in bf16": (
            *(*common, "--precision", "bf16"),
            *("--megatron", str(source.parent / "wrong")),
        ),
        "limit of bf16": (*common, "--max-error-ratio", "3"),
        "limit of fp32": (*common, "--precision", "bf16", "--max-logit-difference", "3"),
        "too long": (*common[:-1], "60"),
        "negative": (*common[:-1], "-1"),
    }
    ranks = run_distributed(_verify_all, 4, list(cases.values()))
    return dict(zip(cases, map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize(
    ("case", "status"),
    [
        *[("hf", 0), ("megatron", 0), ("prompts", 0), ("wrong", 1), ("too long", 2)],
        *[("negative", 2), ("bf16", 0), ("wrong in bf16", 1)],
        *[("limit of bf16", 2), ("limit of fp32", 2)],
    ],
)
def test_exit_status(statuses: dict[str, list[int]], case: str, status: int) -> None:
    assert statuses[case] == [status] * 4


def test_figures_are_written(statuses: dict[str, list[int]], source: Path) -> None:
    figures = json.loads((source.parent / "hf.json").read_text())
    assert figures["holds"] and figures["tensor_parallel"] == figures["pipeline_parallel"] == 2
    for prompt in figures["prompts"]:
        assert prompt["greedy_agreement"] == prompt["num_decided"] == 4
        assert 0 <= prompt["errors"]["rms"] <= prompt["errors"]["max"] < 1e-4
        assert len(prompt["kl"]) == prompt["num_tokens"]


ACCEPTED = ("nothing", "several files", "no prefix", "frequencies", "a classifier", "a value head")
REFUSED = [name for name, (_, says) in CHANGES.items() if says and name not in ACCEPTED]


def _verify_changed(folder: Path) -> dict[str, tuple[int, int]]:
    """Exit statuses for each change of a folder: alone, and with a conversion of the unchanged."""
    source = make_family_checkpoint(folder / "hf", "llama", num_hidden_layers=NUM_LAYERS)
    hf_to_megatron.main([str(source), str(folder / "megatron")])
    tensors, config = load_file(source / "model.safetensors"), (source / "config.json").read_text()
    layout = initialize(ParallelConfig())
    statuses = {}
    with (
        mock.patch.object(verify_conversion, "initialize", lambda config: layout),
        mock.patch.object(verify_conversion, "shutdown"),
    ):
        for name in (*REFUSED, *ACCEPTED):
            changed = Folder(dict(tensors), json.loads(config))
            CHANGES[name][0](changed)
            path = changed.write(folder / name)
            for file in (*source.glob("tokenizer*"), source / "generation_config.json"):
                shutil.copy(file, path)
            command = (str(path), "--new-tokens", "1")
            converted = ("--megatron", str(folder / "megatron"))
            statuses[name] = (_verify(command), _verify((*command, *converted)))
    return statuses


def test_what_transformers_would_warn_of_is_refused(tmp_path: Path) -> None:
    """Also where Megatron reads an older conversion, which leaves out the same tensors."""
    statuses = run_distributed(_verify_changed, 1, tmp_path, timeout_s=400)[0]
    assert statuses == dict.fromkeys(REFUSED, (2, 2)) | dict.fromkeys(ACCEPTED, (0, 0))


def test_transformers_own_list_of_keys_is_looked_at(tmp_path: Path) -> None:
    """Should its rule change, no agreement comes of what both leave out."""
    source = make_family_checkpoint(tmp_path / "hf", "llama")
    tensors = load_file(source / "model.safetensors")
    bias = "model.layers.0.self_attn.o_proj.bias"
    save_file({**tensors, bias: torch.ones(32)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"transformers leaves out {bias}"):
        verify_conversion.load_transformers(source, torch.float32)
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers misses model\.norm\.weight"):
        verify_conversion.load_transformers(source, torch.float32)
    (source / "model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match="transformers cannot load it: "):
        verify_conversion.load_transformers(source, torch.float32)


def compare(ours_TV: torch.Tensor, expected_TV: torch.Tensor, rounding: float) -> Comparison:
    """Of two tokens of a prompt and two new ones."""
    text = Continued("p", [1, 1, 0, 0], 2)
    return verify_conversion.compare(text, ours_TV, expected_TV, Errors(rounding, rounding), 2.0)


def test_comparison_of_known_logits() -> None:
    """Two positions of prompt, two new tokens; Megatron errs by 3 on the last choice."""
    expected_TV = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    ours_TV = expected_TV.clone()
    ours_TV[2, 1] += 3.0
    result = compare(ours_TV, expected_TV, 0.5)
    assert (result.num_decided, result.greedy_agreement) == (2, 1)
    assert result.errors == Errors(3.0, pytest.approx((9 / 8) ** 0.5))
    assert result.limits == Errors(1.0, 1.0)
    p, q = torch.tensor([2.0, 0.0]).softmax(-1), torch.tensor([2.0, 3.0]).softmax(-1)
    assert result.kl == pytest.approx([0, 0, float((p * (p / q).log()).sum()), 0], abs=1e-6)


def test_what_rounding_explains_holds() -> None:
    expected_TV = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    ours_TV = expected_TV.clone()
    ours_TV[1, 1] += 1.5  # another choice, where the margin is 1
    result = compare(ours_TV, expected_TV, 0.99)
    assert (result.num_decided, result.greedy_agreement, result.holds) == (2, 1, False)
    result = compare(ours_TV, expected_TV, 1.0)
    assert (result.num_decided, result.greedy_agreement, result.holds) == (1, 1, True)
    assert not compare(ours_TV, expected_TV, 0.7).holds
    assert not compare(torch.full_like(expected_TV, math.nan), expected_TV, 9.0).holds
    few = torch.full_like(expected_TV, 1.5) + expected_TV
    small = verify_conversion.compare(
        Continued("p", [1, 1, 0, 0], 2), few, expected_TV, Errors(1.0, 0.5), 2.0
    )
    assert small.errors.max <= small.limits.max and not small.holds
