"""What a run says before its first step."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.layouts import write_inputs

SCREEN_LINES, SCREEN_COLUMNS = 40, 120


def test_start_says_what_was_read_on_one_screen(tmp_path: Path) -> None:
    config_file = write_inputs(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    prompts = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    long = '{"prompt": "' + "1+" * 60 + '1=?", "answer": "61"}\n'
    (folder / "train-1.jsonl").write_text("".join([*prompts, long, long]))
    (folder / "train-2.jsonl").write_text("".join(prompts))
    shutil.copy(tmp_path / "prompts.jsonl", folder / "test.jsonl")
    overrides = [
        *(f"data.path={folder}", "training.steps=1", "checkpoint.export_hf=false"),
        *(f"evaluation.sets.sums.path={folder}", "evaluation.sets.sums.split=test"),
        *("evaluation.max_response_tokens=40", "evaluation.at_start=false"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "trb_megatron.train", str(config_file), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout.splitlines()
    count = len(prompts)
    assert (
        f"prompts: {2 * count + 2} rows of {folder} (2 files: train-1.jsonl, train-2.jsonl; split "
        "train, not test), columns prompt, answer; 2 dropped, longer than data.max_prompt_tokens=48"
    ) in report
    (first,) = (line for line in report if line.startswith("first prompt, "))
    assert first.endswith("=?<|im_end|>\\n<|im_start|>assistant\\n'")
    assert (
        f"problems sums: {count} rows of {folder} (test.jsonl; split test, not train), columns "
        "prompt, answer; 0 too long"
    ) in report
    lines = [
        max(1, math.ceil(len(line.replace(str(tmp_path), "")) / SCREEN_COLUMNS)) for line in report
    ]
    assert 20 < sum(lines) <= SCREEN_LINES, done.stdout
