"""The order of the rooms: a room imports from rooms below it only, and the mathematics is light."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trb_megatron"
FLOORS = (
    {"atomic_folder", "escapes", "file_checks", "uniforms", "batch"},
    {"config", "huggingface", "job", "prompts"},
    {"distributed"},
    {"behavior"},
    {"loss", "models"},
    {"rollout", "update"},
    {"plan", "evaluation", "checkpoint"},
    {"run"},
    {"setup"},
    {"trainer"},
    {"train", "evaluate", "launch"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"megatron", "transformers", "pydantic", "safetensors", "tokenizers", "yaml"}


def test_no_room_imports_from_its_own_floor_or_above() -> None:
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in re.findall(r"^\s*(?:from|import) trb_megatron\.(\w+)", file.read_text(), re.M):
            assert other == room or FLOOR[other] < FLOOR[room], f"{file} imports {other}"
        assert "from trb_megatron import" not in file.read_text(), file


@pytest.mark.parametrize("module", ["behavior", "behavior.schedule", "loss", "loss.fused"])
def test_the_mathematics_needs_torch_alone(module: str) -> None:
    code = f"import sys, trb_megatron.{module}; sys.exit(bool(sys.modules.keys() & {HEAVY}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
