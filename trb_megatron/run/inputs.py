"""All that a run reads, known by content: the same files under other names are the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trb_megatron.atomic_folder import write_file
from trb_megatron.checkpoint.folders import written_together
from trb_megatron.config.options import Config
from trb_megatron.config.values import ConfigError
from trb_megatron.distributed.layout import is_rank_zero
from trb_megatron.huggingface.config import HFModelConfig
from trb_megatron.huggingface.digest import digest_share, file_stamps, join_digests
from trb_megatron.huggingface.model_tensors import expected_tensors, open_model
from trb_megatron.job.shared_failure import from_rank_zero
from trb_megatron.models.sources import ModelSources
from trb_megatron.prompts.source import PromptSet

INPUTS_FILE = "inputs.json"
_PROBLEMS = "problems of evaluation.sets."


def digest_inputs(
    config: Config,
    sources: ModelSources,
    prompt_set: PromptSet,
    problem_sets: Mapping[str, PromptSet],
) -> dict[str, str]:
    """Digests of a run's models, tokenizer, prompts and problems, by what they are of.

    Weights are read once: afterwards `inputs.json` in the run's folder vouches for files with the
    same stamps (see `file_stamps`). Collective over all ranks, each of which reads a share.

    Raises:
        RunFolderError: the folder cannot be written to.
    """
    digests = {"prompts": prompt_set.fingerprint, "tokenizer": sources.tokenizer_digests["student"]}
    stop_ids = {"student": sources.alignment.student_ids, "teacher": sources.alignment.teacher_ids}
    file = config.run.dir / INPUTS_FILE
    known = from_rank_zero(lambda: json.loads(file.read_text()) if file.is_file() else {})
    read = {}
    for name, model in sources.models.items():
        read[name] = _digest_weights(model, known.get(name))
        digests[weights_of(name)] = read[name]["digest"]
        digests[f"configuration of the {name}"] = _digest_config(model, stop_ids[name])
    for name, problems in problem_sets.items():
        digests[_PROBLEMS + name] = problems.fingerprint
    with written_together(file, config.run.dir):
        if is_rank_zero():
            write_file(file, json.dumps(read, indent=1) + "\n")
    return digests


def weights_of(name: str) -> str:
    """The key of a model's weights among the digests."""
    return f"weights of the {name}"


def check_same_inputs(
    where: Path, saved: Mapping[str, str], now: Mapping[str, str], *, before: Config, after: Config
) -> None:
    """Refuse to go on with a run, found in `where`, that read something else.

    Problem sets whose options other than the file changed, too, are meant to be others.

    Raises:
        ConfigError: says what differs.
    """
    keys = {
        "prompts": f"{after.data.path}: these are not the prompts that",
        "tokenizer": f"{after.student.path}: this is not the tokenizer with which",
    }
    for name in ("student", "teacher"):
        model = after.student if name == "student" else after.teacher
        for part in ("weights", "configuration"):
            keys[f"{part} of the {name}"] = (
                f"{model and model.path}: these are not the {name}'s {part} with which"
            )
    for name, problems in after.evaluation.sets.items():
        if _options_but_file(before, name) == _options_but_file(after, name):
            keys[_PROBLEMS + name] = f"{problems.path}: these are not the problems with which"
    for key, text in keys.items():
        if key in saved and saved[key] != now.get(key):
            raise ConfigError(
                f"{text} {where} was trained (SHA-256 {saved[key][:12]}, now "
                f"{now.get(key, 'none')[:12]}); restore them or choose another run.dir"
            )


def _digest_weights(model: HFModelConfig, known: dict[str, Any] | None) -> dict[str, Any]:
    """Stamps of a folder's files, and the digest of the tensors that the model is made of."""
    tensors, _ = open_model(model)
    stamps = from_rank_zero(lambda: file_stamps(tensors))
    if known is not None and known["files"] == stamps:
        return known
    num_ranks = dist.get_world_size()
    own = digest_share(tensors, expected_tensors(model), dist.get_rank(), num_ranks)
    shares: list[dict[str, str]] = [{} for _ in range(num_ranks)]
    dist.all_gather_object(shares, own)
    digest = join_digests({name: one for share in shares for name, one in share.items()})
    return {"files": stamps, "digest": digest}


def _digest_config(model: HFModelConfig, stop_ids: tuple[int, ...]) -> str:
    """Of how a model is built, and of its stop ids."""
    values = {**dataclasses.asdict(model), "path": None, "stop_ids": stop_ids}
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _options_but_file(config: Config, name: str) -> dict[str, Any] | None:
    problems = config.evaluation.sets.get(name)
    return None if problems is None else problems.model_dump(exclude={"path", "format"})
