"""HF -> Megatron -> HF: the same bits, the same configuration, at any layout."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import (
    drop_layers,
    hf_to_megatron,
    inspect_checkpoint,
    megatron_to_hf,
    verify_conversion,
)
from tests.families import FAMILIES, make_family_checkpoint
from trb_megatron.checkpoint.checksums import write_sums
from trb_megatron.checkpoint.megatron_tensors import HF_FOLDER, open_megatron_checkpoint
from trb_megatron.huggingface.tensors import INDEX_FILE, CheckpointError, HFTensors
from trb_megatron.huggingface.tokenizer import load_tokenizer

LAYOUTS = [(1, 1), (4, 1), (1, 2), (2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def side_files(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if "safetensors" not in file.name
    }


def assert_same_checkpoint(folder: Path, other: Path) -> None:
    tensors, others = read_tensors(folder), read_tensors(other)
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name
    assert side_files(folder) == side_files(other)


def convert(source: Path, target: Path, *options: str) -> Path:
    hf_to_megatron.main([str(source), str(target), *options])
    return target


def export(source: Path, target: Path, *options: str) -> Path:
    megatron_to_hf.main([str(source), str(target), *options])
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    single = make_family_checkpoint(tmp_path / "single", family, tied=tied, dtype=dtype)
    sharded = make_family_checkpoint(
        tmp_path / "sharded", family, tied=tied, dtype=dtype, max_shard_size="20KB"
    )
    assert len(list(single.glob("*.safetensors"))) == 1 < len(list(sharded.glob("*.safetensors")))
    for tp, pp in LAYOUTS:
        layout = ("--tensor-parallel", str(tp), "--pipeline-parallel", str(pp))
        for source, size in ((single, "1GB"), (sharded, "0.02MB")):
            name = f"{source.name}-{tp}-{pp}"
            megatron = convert(source, tmp_path / name, *layout)
            exported = export(megatron, tmp_path / f"{name}-hf", "--max-shard-size", size)
            assert_same_checkpoint(exported, source)
            assert len(list(exported.glob("*.safetensors"))) == 1 or source is sharded


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_checkpoint(
        tmp_path_factory.mktemp("source") / "hf", "qwen2", max_shard_size="20KB"
    )


@pytest.fixture(scope="module")
def megatron(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("megatron") / "converted")


@pytest.fixture
def damaged(source: Path, megatron: Path, tmp_path: Path) -> Path:
    """A folder with copies of both checkpoints, to be damaged."""
    shutil.copytree(source, tmp_path / "hf")
    shutil.copytree(megatron, tmp_path / "megatron")
    return tmp_path


def refusal(
    command: Callable[[list[str]], None], *arguments: object, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a command says when it refuses its input."""
    with pytest.raises(SystemExit) as stop:
        command([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_types_are_kept_tensor_by_tensor(tmp_path: Path) -> None:
    source = make_family_checkpoint(tmp_path / "hf", "qwen3", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        tensors[name] = torch.randn(tensors[name].shape)  # values that bf16 doesn't have
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    exported = export(convert(source, tmp_path / "megatron"), tmp_path / "back")
    assert_same_checkpoint(exported, source)


def test_dry_run_names_everything_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_to_megatron.main([str(source), str(tmp_path / "target"), "--dry-run"])
    said = capsys.readouterr().out
    for name in read_tensors(source):
        assert name in said
    assert "memory needed" in said
    assert not list(tmp_path.iterdir())


def test_inspection_reads_both_formats(
    source: Path, megatron: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in ((source, "Hugging Face"), (megatron, "Megatron")):
        inspect_checkpoint.main([str(folder), "--json", "--tensors"])
        description = json.loads(capsys.readouterr().out)
        assert (description["format"], description["family"]) == (name, "qwen2")
        assert description["num_layers"] == 3 and description["tensors"]


def test_target_that_exists_is_kept_without_overwrite(
    source: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = damaged / "megatron"
    (target / "mine").write_text("precious")
    said = refusal(hf_to_megatron.main, source, target, capsys=capsys)
    assert "exists" in said and "--overwrite" in said
    assert (target / "mine").read_text() == "precious"
    hf_to_megatron.main([str(source), str(target), "--overwrite"])
    assert not (target / "mine").exists()
    assert_same_checkpoint(export(target, damaged / "back"), source)


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    index = json.loads((folder / INDEX_FILE).read_text())
    others = {k: v for k, v in index["weight_map"].items() if v != file.name}
    index["weight_map"] = {**others, **dict.fromkeys(tensors, file.name)}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


BAD_HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (
        lambda folder: _edit_config(folder, model_type="gpt_neox"),
        "supported: llama, mistral, qwen2, qwen3, qwen3_moe",
    ),
    "missing tensor": (
        lambda folder: _edit_tensors(folder, dict.popitem),
        "tensors are missing: ",
    ),
    "wrong shape": (
        lambda folder: _edit_config(folder, intermediate_size=64),
        "has shape [48, 32], config.json asks for [64, 32]",
    ),
    "truncated": (
        lambda folder: _truncate(max(folder.glob("*.safetensors"))),
        "truncated or corrupt",
    ),
    "corrupt": (
        lambda folder: max(folder.glob("*.safetensors")).write_bytes(b"\xff" * 64),
        "truncated or corrupt",
    ),
    "missing shard": (
        lambda folder: max(folder.glob("*.safetensors")).unlink(),
        "no such file, but model.safetensors.index.json names it",
    ),
    "quantised": (
        lambda folder: _edit_config(folder, quantization_config={"quant_method": "awq"}),
        "quantised weights (quantization_config, method 'awq')",
    ),
    "int8": (
        lambda folder: _edit_tensors(
            folder, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()})
        ),
        "only fp32, fp16 and bf16 weights",
    ),
    "pickle": (
        lambda folder: (
            [file.unlink() for file in folder.glob("*.safetensors*")],
            (folder / "pytorch_model.bin").write_bytes(b"pickle"),
        ),
        "the weights are pickles (pytorch_model.bin)",
    ),
    "tokenizer too large": (
        lambda folder: _edit_config(folder, vocab_size=40),
        "the tokenizer has ids up to 53, but vocab_size is 40",
    ),
    "stop id": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [0, 60]}'),
        "stop id 60 is not in the tokenizer",
    ),
}


@pytest.mark.parametrize("name", BAD_HF)
def test_bad_hf_checkpoint_is_refused(
    damaged: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_HF[name]
    damage(damaged / "hf")
    said = refusal(hf_to_megatron.main, damaged / "hf", damaged / "target", capsys=capsys)
    assert message in said
    assert not list(damaged.glob("target*"))


def test_other_heads_are_left_out_with_a_warning(
    damaged: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged / "hf"
    _edit_tensors(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(3)}))
    exported = export(convert(folder, damaged / "target"), damaged / "back")
    said = capsys.readouterr().err
    assert "warning: " in said and "1 of the tensors (score.weight) belong to another head" in said
    assert_same_checkpoint(exported, source)


@pytest.mark.parametrize("command", [hf_to_megatron, inspect_checkpoint, drop_layers])
def test_tensors_that_the_model_lacks_are_refused(
    damaged: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged / "hf"
    name = "model.layers.0.self_attn.o_proj.bias"
    _edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(32)}))
    options = {hf_to_megatron: ["out"], drop_layers: ["out", "--layers", "1"]}
    arguments = [folder, *options.get(command, [])]
    said = refusal(command.main, *arguments, capsys=capsys)
    assert said.startswith(f"error: {folder}: 1 of the tensors ({name}) have no place in a qwen2")


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
@pytest.mark.parametrize("option", ["--tensor-parallel", "--pipeline-parallel"])
@pytest.mark.parametrize("command", [hf_to_megatron, verify_conversion])
def test_numbers_of_ranks_are_checked(
    command: Any, option: str, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["hf", *(["out"] if command is hf_to_megatron else []), option, count])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {option}: {count!r} is no number of ranks; write 1 or more" in said


def _data_file(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


BAD_MEGATRON: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda folder: (folder / ".metadata").unlink(), "not a complete Megatron"),
    "broken index": (lambda folder: (folder / ".metadata").write_bytes(b"?"), ".metadata: corrupt"),
    "truncated": (lambda folder: _truncate(_data_file(folder)), "truncated"),
    "missing data": (lambda folder: _data_file(folder).unlink(), "no such file"),
    "overwritten": (
        lambda folder: _data_file(folder).write_bytes(bytes(_data_file(folder).stat().st_size)),
        "truncated or corrupt",
    ),
    "contradiction": (
        lambda folder: _edit_config(folder / HF_FOLDER, intermediate_size=64),
        "the configuration asks for",
    ),
    "no configuration": (
        lambda folder: (folder / HF_FOLDER / "config.json").unlink(),
        "config.json: no such file",
    ),
}


@pytest.mark.parametrize("name", BAD_MEGATRON)
def test_bad_megatron_checkpoint_is_refused(
    damaged: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_MEGATRON[name]
    folder = damaged / "megatron"
    damage(folder)
    said = refusal(megatron_to_hf.main, folder, damaged / "target", capsys=capsys)
    assert f"{folder}: damaged: " in said or name == "no index"
    write_sums(folder)  # as if it had been written so
    said = refusal(megatron_to_hf.main, folder, damaged / "target", capsys=capsys)
    assert message in said
    assert not list(damaged.glob("target*"))


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "5 parsecs"])
def test_sizes_are_checked(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(megatron_to_hf.main, "a", "b", "--max-shard-size", size, capsys=capsys)
    assert "is not a size" in said


# Tokenizers


def write_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Put a SentencePiece model in the place of a checkpoint's tokenizer, as Llama 2 has it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    corpus = ["what is the sum of these numbers", "the answer is in the box", "12 + 30 = 42"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=60,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_sentencepiece_tokenizer_is_used_and_carried(tmp_path: Path) -> None:
    source = make_family_checkpoint(tmp_path / "hf", "llama")
    original = write_sentencepiece(source)
    exported = export(convert(source, tmp_path / "megatron"), tmp_path / "back")
    assert_same_checkpoint(exported, source)
    tokenizer = load_tokenizer(exported)
    for text in ("the sum is 42", "what  is  in the box", "12 + 30"):
        ids = original.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


# Killed at any moment


def _run_and_kill(seconds: float | None, command: Callable[..., Path], *arguments: object) -> bool:
    """Run a conversion in a process of its own; whether it was killed `seconds` later, at work."""
    process = multiprocessing.get_context("fork").Process(target=command, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _check_kills(num_kills: int, source: Path, folder: Path) -> None:
    """Kill both conversions; what a loader takes for complete must be, and a new run finishes."""
    steps: tuple[tuple[Callable[..., Path], Path, Path], ...] = (
        (convert, source, folder / "megatron"),
        (export, folder / "megatron", folder / "back"),
    )
    moments = random.Random(0)
    for command, origin, target in steps:
        durations = []
        for _ in range(2):
            started = time.monotonic()
            assert not _run_and_kill(None, command, origin, target, "--overwrite")
            durations.append(time.monotonic() - started)
        assert_complete = _assert_megatron if command is convert else assert_same_checkpoint
        num_killed = num_partial = 0
        for attempt in range(5 * num_kills):
            # All the kills asked for, and more until enough of them fell into the writing.
            if attempt >= num_kills and num_partial >= num_kills // 4:
                break
            replace = ("--overwrite",) if attempt % 2 else ()
            if not replace:
                shutil.rmtree(target, ignore_errors=True)
            moment = moments.uniform(0, min(durations))
            num_killed += _run_and_kill(moment, command, origin, target, *replace)
            partial = target.with_name(target.name + ".partial")
            num_partial += partial.exists()
            if target.exists():
                assert_complete(target, source)
            if partial.exists():
                with pytest.raises(CheckpointError, match="incomplete"):
                    (open_megatron_checkpoint if command is convert else HFTensors)(partial)
            command(origin, target, "--overwrite")
            assert_complete(target, source)
            assert not partial.exists()
        assert num_killed >= num_kills // 4, "the kills came too late to mean anything"
        assert num_partial >= num_kills // 4, "the kills came before anything was written"


def _assert_megatron(folder: Path, source: Path) -> None:
    tensors, _ = open_megatron_checkpoint(folder)
    for name, tensor in read_tensors(source).items():
        assert torch.equal(tensors.slice(name)[:], tensor), name
    assert side_files(folder / HF_FOLDER) == side_files(source)


def test_killed_conversion_leaves_nothing_that_looks_complete(source: Path, tmp_path: Path) -> None:
    _check_kills(8, source, tmp_path)


@pytest.mark.slow
def test_conversion_killed_at_twenty_moments(source: Path, tmp_path: Path) -> None:
    _check_kills(20, source, tmp_path)
