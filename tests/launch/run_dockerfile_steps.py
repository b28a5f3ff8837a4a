"""Build a target of the Dockerfile without Docker, then run commands in it.

    python tests/launch/run_dockerfile_steps.py TARGET [--arg NAME=VALUE ...] [--run COMMAND ...]

The steps run as they stand, as root and at their own paths, in a copy-on-write view of this machine
(an overlay mount) that is thrown away. In the place of the base image, which needs a registry, is
a fresh virtual environment of the Python version that the image's tag names; tools that a slim
image lacks (git, compilers) are taken away. Needs Linux, root and that Python.

COMMANDs run as the image's user. `docker run --user` with another user is tried as well: it must
be able to write to the home folder and to a mounted runs/, and not to the sources.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "TRB_DOCKERFILE_STEPS_INSIDE"
ABSENT = ("git", "gcc", "g++", "cc", "c++", "clang", "make")
SYSTEM_PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STAND_IN = "/opt/image-python"


@dataclass
class Stage:
    """One target: its base image, as written, and its instructions in order."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse_stages(dockerfile: Path) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first FROM with their defaults, and the stages."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for step in DockerfileParser(path=str(dockerfile)).structure:
        kind, value = step["instruction"], step["value"]
        if kind == "FROM":
            base, _, name = re.split(r"\s+(AS)\s+", value, flags=re.IGNORECASE)
            stages.append(Stage(name, base))
        elif kind == "COMMENT":
            continue
        elif stages:
            stages[-1].steps.append((kind, value))
        else:
            assert kind == "ARG", f"{kind} before FROM"
            name, _, default = value.partition("=")
            arguments[name] = default
    return arguments, stages


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}."""
    return re.sub(
        r"\$(?:\{(\w+)\}|(\w+))", lambda match: values.get(match[1] or match[2], ""), text
    )


def parse_pairs(value: str) -> dict[str, str]:
    """The NAME=VALUE pairs of an ENV or a LABEL."""
    pairs = re.findall(r'([\w.]+)=("[^"]*"|\S*)', value)
    return {name: text.strip('"') for name, text in pairs}


def is_ignored(path: PurePosixPath, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path of the context out; the last pattern that fits decides."""
    ignored = False
    for line in patterns:
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            fits = any(fnmatch(part, pattern.removeprefix("**/")) for part in path.parts)
        else:
            fits = any(fnmatch(str(part), pattern) for part in (path, *path.parents[:-1]))
        if fits:
            ignored = not line.startswith("!")
    return ignored


def context_files(root: Path) -> Iterator[PurePosixPath]:
    """The files that `COPY . .` copies."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    for folder, folders, files in os.walk(root):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        folders[:] = [name for name in folders if not is_ignored(here / name, patterns)]
        yield from (here / name for name in files if not is_ignored(here / name, patterns))


def copied_files(root: Path, source: str) -> dict[PurePosixPath, PurePosixPath]:
    """What COPY takes of one source: file of the context -> its path below the destination."""
    top = PurePosixPath(source)
    if (root / top).is_file():
        return {top: PurePosixPath(top.name)} if top in set(context_files(root)) else {}
    return {file: file.relative_to(top) for file in context_files(root) if file.is_relative_to(top)}


class Container:
    """A copy-on-write view of this machine, in which the steps of one target run."""

    def __init__(self, scratch: Path) -> None:
        self.root = scratch / "root"
        for name in ("upper", "work", "root"):
            (scratch / name).mkdir()
        layers = f"lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root], check=True)
        for name in ("proc", "dev"):
            subprocess.run(["mount", "--rbind", f"/{name}", self.root / name], check=True)
        self.env = {"PATH": f"{STAND_IN}/bin:{SYSTEM_PATH}"}
        self.arguments: dict[str, str] = {}
        self.workdir = "/"
        self.user = "root"

    def start_from(self, image: str) -> None:
        """Put a fresh Python in the place of a python:X.Y image."""
        match = re.search(r"python:(\d+\.\d+)", image)
        assert match, f"{image}: only python:X.Y images have a stand-in"
        python = find_python(match[1])
        assert python, f"no Python {match[1]} found"
        for folder in (self.root / python.relative_to("/")).parents:
            if folder.is_relative_to(self.root):
                folder.chmod(folder.stat().st_mode | 0o011)  # the image's user runs it, too
        self.run(f"{python} -m venv {STAND_IN}", "FROM")
        for folder in SYSTEM_PATH.split(":"):
            for name in ABSENT:
                (self.root / folder.strip("/") / name).unlink(missing_ok=True)

    def step(self, kind: str, value: str, given: Mapping[str, str]) -> None:
        """Carry out one instruction."""
        expanded = substitute(value, {**self.arguments, **self.env})
        if kind == "ARG":
            name, has_default, default = value.partition("=")
            if name in given or has_default:
                self.arguments[name] = given.get(name, default.strip('"'))
        elif kind == "ENV":
            self.env |= parse_pairs(expanded)
        elif kind == "WORKDIR":
            self.workdir = expanded
            (self.root / expanded.strip("/")).mkdir(parents=True, exist_ok=True)
        elif kind == "USER":
            self.user = expanded
        elif kind == "COPY":
            *sources, destination = expanded.split()
            target = self.root / self.workdir.strip("/") / destination
            for source in sources:
                for file, path in copied_files(ROOT, source).items():
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, target / path)
        elif kind == "RUN":
            self.run(value, "RUN")
        else:
            assert kind in ("LABEL", "CMD"), f"{kind} is not known here"

    def run(self, command: str, label: str, user: str | None = None) -> None:
        """Run a shell command inside; a failure raises CalledProcessError."""
        print(f"--- {label} {command}", flush=True)
        started = time.monotonic()
        passed = {
            k: v for k, v in os.environ.items() if re.match(r"PIP_|SSL_|\w+_(proxy|PROXY)", k)
        }
        user = user or self.user
        subprocess.run(
            [
                *("chroot", f"--userspec={user}:{user}", self.root),
                *("/bin/sh", "-c", f'cd "{self.workdir}" && {command}'),
            ],
            env={**passed, **self.arguments, **self.env},
            check=True,
        )
        print(f"--- {time.monotonic() - started:.0f} s", flush=True)


def find_python(version: str) -> Path | None:
    """An interpreter of this version that can build environments: on PATH, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in (f"python{version}", *sorted(pyenv.glob(f"versions/{version}*/bin/python"))):
        command = [str(python), "-c", "import ensurepip, sys; print(sys.executable)"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if found.returncode == 0:
            return Path(found.stdout.strip()).resolve()
    return None


def why_impossible() -> str | None:
    """What this machine lacks for `build`."""
    if os.geteuid() != 0:
        return "needs root"
    with tempfile.TemporaryDirectory() as scratch:
        script = (
            f"cd {scratch} && mkdir u w m && "
            "mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w m"
        )
        if subprocess.run(["unshare", "--mount", "sh", "-c", script], check=False).returncode != 0:
            return "needs overlay mounts"
    return None


def build(target: str, given: Mapping[str, str], commands: list[str], scratch: Path) -> None:
    """Carry out a target's steps, then run the commands and try what users may write to."""
    arguments, stages = parse_stages(ROOT / "Dockerfile")
    (stage,) = (stage for stage in stages if stage.name == target)
    container = Container(scratch)
    container.start_from(substitute(stage.base, {**arguments, **given}))
    for kind, value in stage.steps:
        container.step(kind, value, given)
    for command in commands:
        container.run(command, "as the image's user:")
    for user, label in ((None, "as the image's user:"), ("12345", "as user 12345:")):
        name = user or "file"
        writes = f'touch "$HOME/{name}" runs/{name} && ! touch trb_megatron/{name} 2> /dev/null'
        container.run(writes, label, user)


def main() -> None:
    """Run the command inside a mount namespace of its own, so that nothing stays mounted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--run", action="append", default=[], metavar="COMMAND")
    options = parser.parse_args()
    if INSIDE in os.environ:
        given = dict(pair.split("=", 1) for pair in options.arg)
        build(options.target, given, options.run, Path(os.environ.pop(INSIDE)))
        return
    if reason := why_impossible():
        sys.exit(f"the steps cannot be run here: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        command = ["unshare", "--mount", sys.executable, *sys.argv]
        status = subprocess.run(command, env={**os.environ, INSIDE: scratch}, check=False)
    sys.exit(status.returncode)


if __name__ == "__main__":
    main()
