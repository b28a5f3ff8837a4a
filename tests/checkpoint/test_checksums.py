"""Sums of a checkpoint's files: all of them, as `sha256sum` writes them, and any damage named."""

import shutil
import subprocess
from pathlib import Path

import pytest

from trb_megatron.checkpoint.checksums import (
    SUMS_FILE,
    _divide,
    check_sums,
    find_damage,
    write_sums,
)
from trb_megatron.huggingface.tensors import CheckpointError

NAMES = (".metadata", "__0_0.distcp", "common.pt", "hf/config.json", "hf/odd \\ na\nme", "empty")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step_3"
    (folder / "hf").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([number]) * (0 if name == "empty" else 1000 + number))
    write_sums(folder)
    return folder


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_agrees(folder: Path) -> None:
    command = ["sha256sum", "-c", "--strict", SUMS_FILE]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK\n") == len(NAMES)


def test_folder_as_written_is_good(folder: Path) -> None:
    (folder / "note.txt").write_text("mine")
    assert find_damage(folder) is None
    check_sums(folder)
    write_sums(folder)
    assert find_damage(folder) is None


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert find_damage(folder) == f"{name} is missing"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "empty"])
def test_flipped_bit_and_truncation_are_named(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for damaged in (data[:500] + bytes([data[500] ^ 1]) + data[501:], data[:-1], data + b"\0"):
        (folder / name).write_bytes(damaged)
        assert find_damage(folder) == f"{name} differs from its sum in {SUMS_FILE}"
        with pytest.raises(CheckpointError, match=r"(?s)step_3: damaged: .* differs from its sum"):
            check_sums(folder)


def test_damaged_sums_are_noticed_wherever_they_are_cut(folder: Path) -> None:
    data = (folder / SUMS_FILE).read_bytes()
    for length in range(len(data)):
        (folder / SUMS_FILE).write_bytes(data[:length])
        assert find_damage(folder) == f"{SUMS_FILE} is broken or cut short", length
    for position in range(0, len(data), 7):
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        (folder / SUMS_FILE).write_bytes(flipped)
        assert find_damage(folder) is not None, position
    (folder / SUMS_FILE).unlink()
    assert find_damage(folder) == f"{SUMS_FILE} is missing"


def test_file_that_cannot_be_read_is_named(folder: Path) -> None:
    file = folder / "common.pt"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # reading its first byte is an input/output error
    assert find_damage(folder) == "common.pt cannot be read (Input/output error)"
    with pytest.raises(OSError, match=r"common\.pt: Input/output error"):
        write_sums(folder)


def test_work_is_divided_by_bytes() -> None:
    sizes = {"a": 10, "b": 9, "c": 8, "d": 7, "e": 1}
    shares = _divide(sizes, 2)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert [sum(sizes[name] for name in share) for share in shares] == [18, 17]
    assert _divide({"a": 1}, 3) == [["a"], [], []]
