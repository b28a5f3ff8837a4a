"""The Dockerfile: what it copies exists, what it pins fits, and the CPU image's steps work."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

from launch.docker.plan_install import canonical, plan_constraints
from tests.launch.run_dockerfile_steps import (
    ROOT,
    Stage,
    copied_files,
    find_python,
    is_ignored,
    parse_stages,
    substitute,
    why_impossible,
)

ARGUMENTS, STAGES = parse_stages(ROOT / "Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "launch" / "docker" / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]
IMAGE = re.compile(r"[\w.-]+(/[\w.-]+)*:(?P<tag>\d[\w.-]*)")


def steps(stage: Stage, kind: str) -> list[str]:
    return [value for name, value in stage.steps if name == kind]


def test_targets_are_there() -> None:
    assert [stage.name for stage in STAGES] == ["cpu", "gpu"]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_base_image_has_a_release_and_can_come_from_a_mirror(stage: Stage) -> None:
    assert re.fullmatch(r"\$\{\w+\}", stage.base)
    assert IMAGE.fullmatch(substitute(stage.base, ARGUMENTS))
    assert substitute(
        stage.base, {**ARGUMENTS, "CPU_IMAGE": "mirror/a:1", "GPU_IMAGE": "mirror/a:1"}
    )


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_copied_files_exist(stage: Stage) -> None:
    for value in steps(stage, "COPY"):
        *sources, destination = value.split()
        assert not destination.startswith("--")
        for source in sources:
            assert copied_files(ROOT, source), f"COPY {value}: nothing of {source} is there"


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("trb_megatron/config/options.py", False),
        ("launch/demo/student/model.safetensors", False),
        ("trb_megatron/__pycache__/config.cpython-312.pyc", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("runs/demo/hf/model.safetensors", True),
        ("token.txt", True),
    ],
)
def test_only_sources_are_sent(path: str, ignored: bool) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    assert is_ignored(PurePosixPath(path), patterns) == ignored


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_users_are_not_root(stage: Stage) -> None:
    user = steps(stage, "USER")[-1]
    assert user.isdigit() and int(user) > 0  # by number: clusters check that without /etc/passwd
    assert any(f"useradd --uid {user} " in command for command in steps(stage, "RUN"))
    last_write = max(i for i, (kind, _) in enumerate(stage.steps) if kind in ("RUN", "COPY"))
    assert last_write < stage.steps.index(("USER", user))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_requirements_are_installed_before_sources_are_copied(stage: Stage) -> None:
    """Else every change of a source would install everything again."""
    requirements = next(i for i, (_, v) in enumerate(stage.steps) if "--requirement" in v)
    sources = stage.steps.index(("COPY", ". ."))
    assert requirements < sources
    assert not any("REVISION" in value for _, value in stage.steps[:sources])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_install_follows_the_plan(stage: Stage) -> None:
    installs = [command for command in steps(stage, "RUN") if "pip install" in command]
    assert len(installs) == 2
    for command in installs:
        assert "PIP_CONSTRAINT=/tmp/plan/constraints.txt python -m pip install" in command
        (arguments,) = re.findall(r"pip install (.*?)(?: && |$)", command)
        named = [word for word in arguments.split() if not word.startswith("-")]
        assert named in (["/tmp/plan/requirements.txt"], ["."])


def test_pins_are_exact_and_named_once() -> None:
    assert len({pin.name for pin in PINS}) == len(PINS)
    for pin in PINS:
        assert re.fullmatch(r"==[\d.]+", str(pin.specifier)), pin
        assert pin.name == canonical(pin.name)


@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
)
def test_every_requirement_has_a_pin_that_fits(line: str) -> None:
    requirement = Requirement(line)
    (pin,) = (pin for pin in PINS if pin.name == canonical(requirement.name))
    (specifier,) = pin.specifier
    assert requirement.specifier.contains(specifier.version)


def test_the_index_package_apex_is_never_installed() -> None:
    """That name belongs to another project; NVIDIA's image brings the real one."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    assert "apex" not in {canonical(Requirement(line).name) for line in lines}
    assert "apex" not in {pin.name for pin in PINS}


def test_plan_keeps_what_an_image_brings() -> None:
    installed = {"torch": "2.13.0a0+8145d630e8.nv26.06", "flash-attn": "2.7.4", "rich": "14.0"}
    pins = ["torch==2.13.0", "Rich==15.0.0", "math_verify==0.9.0"]
    assert plan_constraints(pins, installed) == [
        "flash-attn==2.7.4",
        "torch==2.13.0a0+8145d630e8.nv26.06",
        "math_verify==0.9.0",
    ]
    assert plan_constraints(pins, {"pip": "25.0"}) == pins


# Builds the image but for its base, which takes minutes: torch alone is some GB.
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_steps_of_the_cpu_image_work() -> None:
    if reason := why_impossible():
        pytest.skip(reason)
    if find_python("3.12") is None:
        pytest.skip("needs Python 3.12, the image's")
    evaluation = (
        "python -m trb_megatron.evaluate launch/demo/distill.yaml "
        "student.path=launch/demo/teacher parallel.tensor_model_parallel_size=1 "
        "evaluation.sets.heldout.limit=8"
    )
    commands = ("python -m trb_megatron.train --help", evaluation, "trb-inspect-checkpoint --help")
    script = [sys.executable, str(Path(__file__).with_name("run_dockerfile_steps.py")), "cpu"]
    options = [word for command in commands for word in ("--run", command)]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert '"eval/heldout/pass@1": ' in done.stdout
