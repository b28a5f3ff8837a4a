"""HF -> Megatron -> HF: the same bits, the same configuration, at any layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import hf_to_megatron, megatron_to_hf
from tests.families import FAMILIES, make_family_checkpoint

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
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
