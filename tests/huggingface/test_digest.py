"""Stamps of weights: other content never has the same."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.tiny import make_checkpoint
from trb_megatron.huggingface.digest import file_stamps
from trb_megatron.huggingface.tensors import SINGLE_FILE, HFTensors

TIME = (1, 1)  # as an archive or image may have it for every file


def stamps(folder: Path) -> list[list[str | int]]:
    return file_stamps(HFTensors(folder))


def _change_value(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, TIME)


def _rewrite(folder: Path) -> Path:
    content = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(folder / SINGLE_FILE, TIME)
    return folder


def _replace(folder: Path) -> Path:
    shutil.copy2(folder / SINGLE_FILE, folder / "new")
    _change_value(folder / "new")
    (folder / "new").rename(folder / SINGLE_FILE)
    return folder


def _another_folder(folder: Path) -> Path:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    _change_value(other / SINGLE_FILE)
    return other


def _another_link(folder: Path) -> Path:
    other = _another_folder(folder)
    (folder / SINGLE_FILE).unlink()
    (folder / SINGLE_FILE).symlink_to(other / SINGLE_FILE)
    return folder


@pytest.mark.parametrize("change", [_rewrite, _replace, _another_folder, _another_link])
def test_other_weights_have_other_stamps(change: Callable[[Path], Path], tmp_path: Path) -> None:
    """Of the same name, size and modification time."""
    folder = make_checkpoint(tmp_path / "model")
    os.utime(folder / SINGLE_FILE, TIME)
    before, stat = stamps(folder), (folder / SINGLE_FILE).stat()
    changed = change(folder)
    now = (changed / SINGLE_FILE).stat()
    assert (stat.st_size, stat.st_mtime_ns) == (now.st_size, now.st_mtime_ns)
    assert stamps(changed) != before


def test_the_same_file_has_the_same_stamps_by_any_path(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    assert stamps(tmp_path / "link") == stamps(folder) == stamps(tmp_path / "link" / ".")
