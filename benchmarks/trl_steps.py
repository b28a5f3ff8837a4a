"""Steps of TRL's DistillationTrainer; `beside_trl` runs this file with TRL's interpreter.

    python benchmarks/trl_steps.py FOLDER RESPONSE_TOKENS ROWS STEPS

FOLDER holds student, teacher and prompts.jsonl. ROWS is the number of responses in one forward
pass; a step takes all prompts. Prints a line of JSON: seconds of each step but the first and of its
rollouts, the peak memory of the process in GB, and the loss of the first step.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """It ends."""
        self.seconds.append(time.perf_counter() - self._begun)


class TimedTrainer(DistillationTrainer):
    """TRL's trainer, with the seconds of each generation."""

    generations: list[float]

    def _generate(self, prompts: list) -> Any:
        begun = time.perf_counter()
        result = super()._generate(prompts)
        self.generations.append(time.perf_counter() - begun)
        return result


def main() -> None:
    """Run the steps and print what they took."""
    folder = Path(sys.argv[1])
    num_tokens, num_rows, num_steps = map(int, sys.argv[2:])
    torch.set_num_threads(1)
    prompts = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    clock = Clock()
    trainer = TimedTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=DistillationConfig(
            output_dir=str(folder / "trl"),
            max_steps=num_steps,
            per_device_train_batch_size=num_rows,
            gradient_accumulation_steps=len(prompts) // num_rows,
            max_completion_length=num_tokens,
            beta=1.0,  # the reverse KL
            learning_rate=1e-4,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[clock],
    )
    trainer.generations = []
    trainer.train()
    result = {
        "step": clock.seconds[1:],
        "rollout": trainer.generations[1:],
        "peak": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9],
        "loss": [trainer.state.log_history[0]["loss"]],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
