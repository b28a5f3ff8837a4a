"""Folders without safetensors are refused with what makes a folder that can be used."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import make_checkpoint
from trb_megatron.huggingface.config import read_hf_config
from trb_megatron.huggingface.tensors import INDEX_FILE, CheckpointError, HFTensors
from trb_megatron.huggingface.tokenizer import load_tokenizer


def refusal(path: Path) -> str:
    """The message with which both readers of a model folder refuse a path."""
    messages = []
    for read in (read_hf_config, load_tokenizer):
        with pytest.raises(CheckpointError) as refused:
            read(path)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert str(path) in messages[0]
    return messages[0]


def command(message: str) -> list[str]:
    """The command at the end of a message, as a shell would take it apart."""
    (line,) = re.findall(r"^    (python .*)$", message, re.M)
    words = shlex.split(line)
    assert words[:2] == ["python", "-c"]
    assert not set(words[2]) & set('"$`\\'), "a shell would read more into them"
    ast.parse(words[2])
    return words


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["consolidated.00.pth", "params.json"], "Meta's own format; only safetensors"),
        (["consolidated.safetensors"], "Mistral's own format"),
        (["model-00001-of-00002.safetensors"], "without their index"),
        (["tf_model.h5"], "from_tf=True"),
        (["flax_model.msgpack"], "from_flax=True"),
        (["weights.npz"], "NumPy arrays"),
        (["model.onnx"], "cannot be trained"),
        (["model.pth"], "could run code"),
        (["training.ckpt"], "could run code"),
        (["config.json", "weights.bin"], "could run code"),
    ],
)
def test_other_weights_are_named(names: list[str], expected: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert expected in message
    assert names[-1] in message or names[0] in message


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith(
        "empty; a model folder has config.json, model.safetensors and a tokenizer"
    )
    assert refusal(tmp_path / "absent").endswith("no such model folder")
    (tmp_path / "model.safetensors").touch()
    message = refusal(tmp_path / "model.safetensors")
    assert message.endswith(f"a file; name the model's folder, such as {tmp_path}")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_says_so(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
    (folder / name).write_text(pointer)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: a Git LFS pointer") and "git lfs pull" in message


def test_pointers_that_nobody_reads_do_no_harm(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "README.md"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert read_hf_config(folder).num_layers == 2
    assert len(load_tokenizer(folder)) > 0


@pytest.mark.parametrize("name", ["model-1.safetensors", "part.safetensors"])
def test_a_pointer_among_the_files_of_an_index_says_so(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=f"{name}: a Git LFS pointer"):
        HFTensors(folder)


def test_a_folder_without_weights_can_be_described(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    assert read_hf_config(folder).num_layers == 2
    assert len(load_tokenizer(folder)) > 0


def test_the_command_for_gguf_names_the_finest_file(tmp_path: Path) -> None:
    """transformers needs the package gguf to run it, so that is not done here."""
    folder = tmp_path / "a 'model'"
    folder.mkdir()
    (folder / "model-q4.gguf").write_bytes(b"4")
    (folder / "model-q8.gguf").write_bytes(b"8" * 2)
    with pytest.raises(CheckpointError) as refused:
        read_hf_config(folder)
    message = str(refused.value)
    assert "pip install gguf" in message
    arguments = [str(folder), "model-q8.gguf", str(folder / "model-q8-safetensors")]
    assert command(message)[3:] == arguments
    assert refusal(folder / "model-q8.gguf") == message


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_the_command_for_an_adapter_takes_its_own_tokenizer(
    has_tokenizer: bool, tmp_path: Path
) -> None:
    """Running it needs the package peft, so that is not done here."""
    (tmp_path / "adapter_model.safetensors").touch()
    if has_tokenizer:
        (tmp_path / "tokenizer_config.json").touch()
    message = refusal(tmp_path)
    assert "pip install peft" in message
    _, _, code, *arguments = command(message)
    assert ("base_model_name_or_path" in code) == (not has_tokenizer)
    assert arguments == [str(tmp_path), f"{tmp_path}-safetensors"]


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["adapter_config.json", "adapter_model.safetensors"],
        ["adapter_config.json", "adapter_model.bin"],
        ["adapter_config.json"],
        ["adapter_model.safetensors"],
    ],
)
def test_an_adapter_beside_a_whole_model_is_refused(
    names: list[str], is_sharded: bool, tmp_path: Path
) -> None:
    """transformers with peft would load both; running the command needs peft, too."""
    folder = make_checkpoint(tmp_path / "m")
    if is_sharded:
        weights = (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(weights), weights.name)}
        (folder / INDEX_FILE).write_text(json.dumps(index))
    assert read_hf_config(folder).num_layers == 2
    for name in names:
        (folder / name).write_text("{}")
    message = refusal(folder)
    assert f"an adapter ({', '.join(names)}) lies beside a whole model" in message
    assert "Move these files elsewhere" in message
    assert command(message)[3:] == [str(folder), f"{folder}-merged"]


def test_the_command_for_pickles_makes_a_folder_that_can_be_used(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "a model")
    expected = load_file(folder / "model.safetensors")
    torch.save(expected, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    subprocess.run(
        [sys.executable, *command(refusal(folder))[1:]],
        check=True,
        capture_output=True,
        timeout=120,
    )
    made = tmp_path / "a model-safetensors"
    tensors = HFTensors(made)
    assert tensors.names == set(expected)
    assert all(torch.equal(tensors.slice(name)[:], expected[name]) for name in expected)
    assert read_hf_config(made).num_layers == 2
    assert len(load_tokenizer(made)) > 0
