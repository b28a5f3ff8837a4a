"""Folders that are complete, and on the disk, when they get their name."""

import os
from pathlib import Path

import pytest

from trb_megatron.atomic_folder import finish_folder, new_folder, start_folder, write_file


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, in order."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def seeing_fsync(descriptor: int) -> None:
        seen.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def seeing_rename(path: Path, target: Path) -> Path:
        seen.append(("rename", path.name))
        return rename(path, target)

    def seeing_replace(source: Path, target: Path) -> None:
        seen.append(("rename", source.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seeing_fsync)
    monkeypatch.setattr(Path, "rename", seeing_rename)
    monkeypatch.setattr(os, "replace", seeing_replace)
    return seen


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    target = tmp_path / "run" / "step_3"
    target.parent.mkdir()
    partial = start_folder(target)
    (partial / "hf").mkdir()
    for name in ("common.pt", "hf/config.json", "SHA256SUMS"):
        (partial / name).write_text(name)
    finish_folder(partial, target)
    renamed = events.index(("rename", "step_3.partial"))
    before = {name for kind, name in events[:renamed]}
    assert before == {"common.pt", "hf", "config.json", "SHA256SUMS", "step_3.partial"}
    assert events[renamed + 1 :] == [("flush", "run")]  # the name itself
    assert (target / "hf" / "config.json").read_text() == "hf/config.json"


def test_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    write_file(tmp_path / "config.yaml", "seed: 0\n")
    assert events == [("flush", ".config.yaml.partial"), ("rename", ".config.yaml.partial")]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_folder_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        start_folder(tmp_path / "gone" / "step_3")
    assert not (tmp_path / "gone").exists()
    with new_folder(tmp_path / "asked" / "for") as partial:
        (partial / "file").touch()
    assert (tmp_path / "asked" / "for" / "file").exists()
