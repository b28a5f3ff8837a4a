"""What strangers' files cannot do: run code, or choose where we read and write.

The first half reads our own source for calls that would let them; the second half plants payloads
in checkpoints and loads those.
"""

import ast
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItemType

from checkpoints_tools import inspect_checkpoint
from tests.layouts import write_inputs
from tests.ranks import run_distributed
from tests.runs import make_trainer
from tests.tiny import make_checkpoint
from trb_megatron.checkpoint.checksums import write_sums
from trb_megatron.checkpoint.megatron_tensors import DTYPES_FILE, read_hf_dtypes
from trb_megatron.checkpoint.safe_loading import INDEX_FILE, no_code_from, read_index
from trb_megatron.huggingface.tensors import INDEX_FILE as HF_INDEX_FILE
from trb_megatron.huggingface.tensors import CheckpointError, HFTensors

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("trb_megatron", "checkpoints_tools")
FOLDERS = (*PACKAGES, "launch", "benchmarks", "docs", "tests")
# Spawned test ranks talk to the test that started them.
EXCEPTIONS = {("tests/ranks.py", "pickle.loads"), ("tests/test_security.py", "pickle.loads")}

NEVER = {
    *("eval", "exec", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *("shelve.open", "dill.load", "dill.loads", "joblib.load", "pandas.read_pickle"),
    *("yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("torch.hub.load", "torch.jit.load", "tempfile.mktemp"),
}
# Keywords that are fine with one value only, whoever is called.
ONLY = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
UNSAFE_SHELL = re.compile(r"(?<![\w.-])eval(?![\w(])|(curl|wget)\b.*\|\s*(ba|z)?sh\b")


class _Module:
    """A parsed module: what its local names mean, and what is wrong with its calls."""

    def __init__(self, source: str, in_package: bool) -> None:
        self.found: set[tuple[int, str]] = set()  # (line, what is wrong)
        self._in_package = in_package
        nodes = list(ast.walk(ast.parse(source)))
        self._meaning: dict[str, str] = {}  # local name -> dotted name
        for node in nodes:
            if isinstance(node, ast.Import):
                self._meaning |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self._meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        self._safe_loaders = SAFE_LOADERS | {
            node.name
            for node in nodes
            if isinstance(node, ast.ClassDef)
            and any(self._name(base) in SAFE_LOADERS for base in node.bases)
        }
        for node in nodes:
            if isinstance(node, ast.Call):
                self._check(node, self._name(node.func))

    def _name(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{self._name(node.value)}.{node.attr}"
        return self._meaning.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    def _check(self, node: ast.Call, name: str) -> None:
        constants = {
            keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
            for keyword in node.keywords
        }
        if name in NEVER:
            self._report(node, name)
        for keyword, value in ONLY.items():
            if constants.get(keyword, value) is not value:
                self._report(node, f"{name} with {keyword} other than {value}")
        if (wanted := self._required_keyword(name)) and wanted not in constants:
            self._report(node, f"{name} without {wanted}")
        if name == "yaml.load":
            loaders = [k.value for k in node.keywords if k.arg == "Loader"] + node.args[1:]
            if [self._name(loader) in self._safe_loaders for loader in loaders] != [True]:
                self._report(node, "yaml.load without a safe loader")

    def _required_keyword(self, name: str) -> str | None:
        if self._in_package and name.endswith(".from_pretrained"):
            return "trust_remote_code"
        if name == "torch.load":
            return "weights_only"
        return "filter" if name.endswith(".extractall") else None

    def _report(self, node: ast.Call, what: str) -> None:
        self.found.add((node.lineno, what))


def violations(source: str, *, in_package: bool = True) -> list[tuple[int, str]]:
    """(line, what is wrong) of a Python module."""
    return sorted(_Module(source, in_package).found)


def tree_violations(root: Path) -> Iterator[str]:
    """What is wrong in the Python modules and shell scripts below a root, as file:line: what."""
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            name = file.relative_to(root).as_posix()
            found = violations(file.read_text(encoding="utf-8"), in_package=folder in PACKAGES)
            for line, what in found:
                if (name, what) not in EXCEPTIONS:
                    yield f"{name}:{line}: {what}"
    scripts = [*root.glob(".ci/*"), *root.glob("launch/*.s*")]
    for file in scripts:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if UNSAFE_SHELL.search(text.partition("# ")[0]):
                yield f"{file.relative_to(root)}:{number}: {text.strip()}"


def test_source_has_no_unsafe_call() -> None:
    assert list(tree_violations(ROOT)) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "import os\nos.system(command)",
        "from os import system as run\nrun(command)",
        "import subprocess as sp\nsp.run(command, shell=True)",
        "import subprocess\nsubprocess.Popen(command, shell=use_shell)",
        "import pickle\npickle.loads(data)",
        "from pickle import load\nload(file)",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "from torch import load\nload(file, weights_only=flag)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nclass L(yaml.FullLoader): ...\nyaml.load(text, L)",
        "import yaml\nyaml.unsafe_load(text)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
        "AutoModel.from_pretrained(path)",
        "import tarfile\ntarfile.open(file).extractall(folder)",
    ],
)
def test_planted_call_is_found(tmp_path: Path, source: str) -> None:
    planted = tmp_path / "trb_megatron" / "planted.py"
    planted.parent.mkdir()
    planted.write_text(source)
    (found,) = tree_violations(tmp_path)
    assert found.startswith(f"trb_megatron/planted.py:{len(source.splitlines())}: ")


@pytest.mark.parametrize("source", ['eval "$command"', "curl -s address | bash"])
def test_planted_shell_command_is_found(tmp_path: Path, source: str) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "planted.sbatch").write_text(source)
    assert list(tree_violations(tmp_path)) == [f"launch/planted.sbatch:1: {source}"]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import torch\ntorch.load(file, weights_only=True)",
        "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load(text, Loader=L)",
        "import yaml\nyaml.load(text, Loader=L)\nclass L(yaml.SafeLoader): ...",
        "import numpy as np\nnp.load(file)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_safe_call_is_let_pass(source: str) -> None:
    assert violations(source) == []


# ---------------------------------------------------------------- names in files


def _sharded(folder: Path, file_name: str) -> Path:
    make_checkpoint(folder)
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    weight_map = dict.fromkeys(["model.norm.weight"], file_name)
    (folder / HF_INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/{tmp}/elsewhere.safetensors", 3])
def test_weight_index_cannot_name_files_elsewhere(tmp_path: Path, name: Any) -> None:
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    with pytest.raises(CheckpointError, match="refused, it names the file"):
        HFTensors(_sharded(tmp_path / "hf", name))


def test_recorded_types_are_types_of_weights(tmp_path: Path) -> None:
    (tmp_path / DTYPES_FILE).write_text('{"default": "float32", "others": {"a": "load"}}')
    with pytest.raises(CheckpointError, match=r"no types of weights: \['load'\]"):
        read_hf_dtypes(tmp_path)


# ---------------------------------------------------------------- pickles in checkpoints


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_payload_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").is_dir()


def _plant_in_index(checkpoint: Path, mark: Path) -> None:
    (checkpoint / INDEX_FILE).write_bytes(pickle.dumps(Payload(mark)))


def _plant_behind_index(checkpoint: Path, mark: Path) -> None:
    index = read_index(checkpoint)
    index.planner_data = Payload(mark)
    (checkpoint / INDEX_FILE).write_bytes(pickle.dumps(index))


def _plant_in_common(checkpoint: Path, mark: Path) -> None:
    torch.save(Payload(mark), checkpoint / "common.pt")


PLANTS = {
    plant.__name__: plant for plant in (_plant_in_index, _plant_behind_index, _plant_in_common)
}


def _load_planted(config_file: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """For each plant: what our loading and Megatron's own say and run of the same checkpoint."""
    from megatron.core import dist_checkpointing

    from trb_megatron.checkpoint.training import load_checkpoint, sharded_state

    # Set by people whose other programs need it: ours must not be opened by it.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    trainer = make_trainer(config_file, (f"run.dir={folder}/run",))
    trainer.train_step()
    trainer.save()
    checkpoint = folder / "run" / "checkpoints" / "step_1"
    load_checkpoint(checkpoint, trainer.student_ddp, trainer.optimizer)  # nothing is wrong with it
    outcomes = {}
    for name, plant in PLANTS.items():
        planted, mark = folder / name, folder / f"{name}.mark"
        shutil.copytree(checkpoint, planted)
        plant(planted, mark)
        state = sharded_state(trainer.student_ddp, trainer.optimizer, is_loading=True)
        outcomes[name] = {
            "ours": _outcome(
                mark, load_checkpoint, planted, trainer.student_ddp, trainer.optimizer
            ),
            "theirs": _outcome(mark, dist_checkpointing.load, state, str(planted)),
        }
    assert os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    return outcomes


def _outcome(mark: Path, load: Callable[..., Any], *args: Any) -> tuple[str, bool]:
    """The error of a load, and whether the payload has run."""
    message = ""
    try:
        load(*args)
    except BaseException as error:  # torch's CheckpointException is no Exception
        message = f"{type(error).__name__}: {error}"
    return message, mark.exists()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[str, bool]]]:
    folder = tmp_path_factory.mktemp("planted")
    return run_distributed(_load_planted, 1, write_inputs(folder), folder, timeout_s=300)[0]


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_checkpoint_is_refused_and_runs_nothing(
    outcomes: dict[str, dict[str, tuple[str, bool]]], plant: str
) -> None:
    message, has_run = outcomes[plant]["ours"]
    assert not has_run
    assert message.startswith("TrainingCheckpointError: "), message
    assert "mkdir" in message  # what was refused


def test_megatron_alone_would_have_run_the_payloads(
    outcomes: dict[str, dict[str, tuple[str, bool]]],
) -> None:
    """Else the plants prove nothing."""
    assert {plant: outcome["theirs"][1] for plant, outcome in outcomes.items()} == dict.fromkeys(
        PLANTS, True
    )


def test_conversion_tools_run_nothing_of_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _plant_in_index(tmp_path, tmp_path / "mark")
    write_sums(tmp_path)
    with pytest.raises(SystemExit) as caught:
        inspect_checkpoint.main([str(tmp_path)])
    assert caught.value.code != 0
    output = capsys.readouterr()
    assert "refused, it asks for posix.mkdir" in output.out + output.err
    assert not (tmp_path / "mark").exists()


def test_object_between_the_tensors_runs_nothing(tmp_path: Path) -> None:
    """Torch itself loads such objects with `weights_only=False`."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    dcp.save({"a": torch.zeros(2), "b": Payload(mark)}, checkpoint_id=folder, no_dist=True)
    with no_code_from(folder), pytest.raises(CheckpointException, match="mkdir"):
        dcp.load({"a": torch.ones(2), "b": None}, checkpoint_id=folder, no_dist=True)
    assert not mark.exists()
    dcp.load({"a": torch.ones(2), "b": None}, checkpoint_id=folder, no_dist=True)
    assert mark.exists()  # else the test proves nothing


class Attribute:
    """Is pickled as a call of `getattr`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.arguments = (owner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


def test_index_may_name_members_of_enumerations_alone(tmp_path: Path) -> None:
    """As Python 3.11.2, that of Debian 12, pickles them, whatever Python runs this."""
    member = WriteItemType.SHARD
    for attribute, expected in (
        (Attribute(WriteItemType, "SHARD"), member),
        (Attribute(WriteItemType, "__init__"), "attribute '__init__' of <enum"),
        (Attribute(Metadata, "__init__"), "attribute '__init__' of <class"),
        (Attribute(torch.float32, "is_complex"), "attribute 'is_complex' of torch.float32"),
    ):
        index = Metadata({}, planner_data=attribute, storage_data={})
        (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(index))
        if expected is member:
            assert read_index(tmp_path).planner_data is member
        else:
            with pytest.raises(
                CheckpointError, match=re.escape(f"refused, it asks for the {expected}")
            ):
                read_index(tmp_path)


def test_data_files_lie_in_the_checkpoint(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    dcp.save({"a": torch.zeros(2)}, checkpoint_id=tmp_path, no_dist=True)
    index = read_index(tmp_path)
    ((key, info),) = index.storage_data.items()
    index.storage_data[key] = replace(info, relative_path=f"../{tmp_path.name}/__0_0.distcp")
    (tmp_path / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="refused, it names the file"):
        read_index(tmp_path)
