"""Write what pip installs into an image, and in which versions: requirements.txt, constraints.txt.

    python launch/docker/plan_install.py FOLDER [EXTRA ...]

What the image brings is kept: compiled packages (NVIDIA's torch, Transformer Engine, Apex,
flash-attention, which belong together) in exactly the version they have, others unless a
requirement asks for a newer one. What the image lacks comes in the version that
launch/docker/constraints.txt names.
"""

import re
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYPROJECT = HERE.parents[1] / "pyproject.toml"
COMPILED = re.compile(
    r"(torch.*|(pytorch-)?triton|transformer-engine.*|flash-attn.*|apex|numpy|(nvidia|cuda)-.*)"
)


def canonical(name: str) -> str:
    """A project's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def plan_constraints(pins: list[str], installed: Mapping[str, str]) -> list[str]:
    """Constraints for pip in an image with these packages (canonical name -> version)."""
    kept = [
        f"{name}=={version}"
        for name, version in sorted(installed.items())
        if COMPILED.fullmatch(name)
    ]
    return kept + [pin for pin in pins if canonical(pin.partition("==")[0]) not in installed]


def main(folder: Path, extras: list[str]) -> None:
    """Write both files for the image that this runs in."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    requirements = project["dependencies"] + [line for extra in extras for line in optional[extra]]
    lines = (HERE / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = {d.metadata["Name"]: d.version for d in distributions()}
    installed = {canonical(name): version for name, version in names.items() if name}
    folder.mkdir()
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    constraints = plan_constraints(pins, installed)
    (folder / "constraints.txt").write_text("\n".join(constraints) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
