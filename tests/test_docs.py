"""The documents: current, with links that lead somewhere and commands that exist."""

import io
import multiprocessing
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "launch").glob("*.md")),
]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`((?:[^`\n]|\n(?!\n))+)`(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SCRIPTS = {
    name: entry.partition(":")[0]
    for name, entry in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "scripts"
    ].items()
}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_page_of_the_configuration_is_current() -> None:
    script = ROOT / "docs" / "generate_configuration.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- links


@cache
def anchors(page: Path) -> set[str]:
    """The fragments under which GitHub shows the headings of a page."""
    found: dict[str, int] = {}
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, last in found.items() for n in range(last + 1)}


def broken_links(page: Path) -> Iterator[str]:
    text = INLINE_CODE.sub("code", FENCED.sub("", page.read_text(encoding="utf-8")))
    for link in LINK.findall(text):
        path, _, fragment = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: no such file"
        elif fragment and fragment not in anchors(target):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n[1](#a-b-c) [2](#b) [3](page.md#a-b-c) [4](no.md) `[5](no.md)`\n")
    assert list(broken_links(page)) == ["#b: no such heading", "no.md: no such file"]


# ---------------------------------------------------------------- commands


class Command(NamedTuple):
    """A command of ours: `make TARGET` or the module that runs, and its options."""

    name: str
    options: tuple[str, ...] = ()


def find_commands(text: str) -> Iterator[Command]:
    """Our commands in fenced blocks of bash and in inline code."""
    lines = [code for _, language, code in FENCED.findall(text) if language == "bash"]
    lines += [" ".join(code.split()) for code in INLINE_CODE.findall(FENCED.sub("", text))]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if command := read_command(line.partition(" #")[0].split()):
            yield command


def read_command(words: list[str]) -> Command | None:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["make", *targets]:
            names = [word for word in targets if "=" not in word]
            return Command(f"make {names[0]}") if names else None
        case ["torchrun", *_] | ["python", "-m", "trb_megatron.launch", *_]:
            if "-m" not in words[3:]:
                return None
            module, *rest = words[words.index("-m", 3 if words[0] == "python" else 1) + 1 :]
        case ["python", "-m", module, *rest]:
            pass
        case [script, *rest] if script in SCRIPTS:
            module = SCRIPTS[script]
        case [script, *_] if script.startswith("trb-"):
            return Command(script)
        case _:
            return None
    if not module.startswith(("trb_megatron.", "checkpoints_tools.", "benchmarks.")):
        return None
    options = (word.strip("[]").partition("=")[0] for word in rest)
    return Command(module, tuple(option for option in options if option.startswith("--")))


def test_commands_are_read() -> None:
    text = """```bash
A=1 torchrun --nproc-per-node 2 \\
    -m trb_megatron.train X --dry-run  # why
pip install -e .
```
`python -m trb_megatron.launch ...`, `make X=1
test`, `trb-train Y [--world-size N]`"""
    assert list(find_commands(text)) == [
        Command("trb_megatron.train", ("--dry-run",)),
        Command("make test"),
        Command("trb_megatron.train", ("--world-size",)),
    ]


COMMANDS = sorted({c for page in PAGES for c in find_commands(page.read_text(encoding="utf-8"))})
MODULES = sorted({command.name for command in COMMANDS if "." in command.name})
PARSES = re.compile(r"\.parse_(intermixed_)?args\(")


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each module prints for --help, or its source where it takes no options.

    Each runs in a process of its own, forked from one that has imported what they need.
    """
    files = {name: spec.origin for name in MODULES if (spec := find_spec(name)) and spec.origin}
    sources = {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}
    with_help = [name for name, source in sources.items() if PARSES.search(source)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        printed = pool.map(print_help, with_help, chunksize=1)
    return sources | dict(zip(with_help, printed, strict=True))


def print_help(module: str) -> str:
    sys.argv = [module, "--help"]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return printed.getvalue() if not end.code else f"exit status {end.code}"
    return "did not end after --help"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join((c.name, *c.options)))
def test_command_exists(command: Command, helps: dict[str, str]) -> None:
    if command.name.startswith("make "):
        # Without PYTHON, make would look for an interpreter with torch each time.
        make = [*command.name.split(), "-n", f"PYTHON={sys.executable}"]
        done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert command.name in helps, "no such module"
    usage = helps[command.name]
    assert f"-m {command.name}" in usage or "usage:" in usage, usage
    for option in command.options:
        assert option in usage


# ---------------------------------------------------------------- the example of the interface

NEEDED_BY_NEITHER = ("megatron", "transformers", "safetensors", "pydantic", "yaml", "pyarrow")


@pytest.fixture
def torch_alone() -> Iterator[None]:
    """As if neither our modules nor what they need besides torch had been imported."""

    def loaded(*packages: str) -> set[str]:
        return {name for name in sys.modules if name.partition(".")[0] in packages}

    saved = {name: sys.modules[name] for name in loaded("trb_megatron", *NEEDED_BY_NEITHER)}
    for name in loaded("trb_megatron"):
        del sys.modules[name]
    for name in {*NEEDED_BY_NEITHER, *loaded(*NEEDED_BY_NEITHER)}:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ImportError
    yield
    for name in loaded("trb_megatron", *NEEDED_BY_NEITHER):
        del sys.modules[name]
    sys.modules.update(saved)


def test_example_of_the_interface_runs(
    torch_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "interface.md").read_text(encoding="utf-8")
    (code,) = (code for _, language, code in FENCED.findall(text) if language == "python")
    file = tmp_path / "example.py"
    file.write_text(code)
    runpy.run_path(str(file))
    losses = [float(loss) for loss in re.findall(r"^loss (\S+),", capsys.readouterr().out, re.M)]
    assert losses[-1] < losses[0] / 2
