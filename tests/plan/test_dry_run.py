"""`python -m trb_megatron.train --dry-run` as a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plan.test_plan import write_config
from tests.published import LLAMA3_70B, QWEN3_1_7B

ALL_WORLD_SIZES = """
import sys
from trb_megatron.train import main
config, *overrides = sys.argv[1:]
for exponent in range(11):
    main([config, "--dry-run", "--world-size", str(2**exponent), *overrides])
loaded = {name.split(".")[0] for name in sys.modules}
assert "transformers" in loaded, "the check below would see nothing"
assert "megatron" not in loaded
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_run")
    return write_config(folder, QWEN3_1_7B, LLAMA3_70B | {"vocab_size": 151_936})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_any_world_size_without_megatron_weights_or_data(config_file: Path) -> None:
    result = run("-c", ALL_WORLD_SIZES, str(config_file), "training.prompts_per_step=256")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("dry run: this would start") == 11
    assert "layout: 1 rank = TP 1 x PP 1 x DP 1\n" in result.stdout
    assert "layout: 1,024 ranks = TP 1 x PP 1 x DP 1024 (" in result.stdout
    assert not (config_file.parent / "run").exists()


def test_refusal_is_one_line_after_the_report(config_file: Path) -> None:
    """Options may stand anywhere; without a world size one replica is planned."""
    tp = "parallel.tensor_model_parallel_size=4"
    result = run(
        *("-m", "trb_megatron.train", str(config_file), "--dry-run", tp, "--memory-gb", "40")
    )
    assert result.returncode == 2
    assert "layout: 4 ranks = TP 4 x PP 1 x DP 1" in result.stdout
    assert "dry run: this would start" not in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: 38.0 of 40.0 GB can be used on each rank, but training needs")
    assert line.endswith(
        "raise parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--world-size", "2"), "--world-size and --memory-gb are for --dry-run"),
        (("--dry-run", "--world-size", "0"), "argument --world-size: 0: expected a number above 0"),
        (("--dry-run", "--memory-gb", "much"), "argument --memory-gb: invalid float value: 'much'"),
        (("--dry-run", "--memory-gb", "nan"), "expected a number above 0"),
        (("--dry-rum",), "unrecognized arguments: --dry-rum"),
    ],
)
def test_wrong_options_are_named(
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    from trb_megatron.train import main

    with pytest.raises(SystemExit) as caught:
        main([str(config_file), *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
