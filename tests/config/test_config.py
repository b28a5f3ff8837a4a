"""The configuration: reading, overriding, refusing, writing back."""

import random
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from trb_megatron.config.conflicts import check_world_size, config_warnings
from trb_megatron.config.options import Config, ParallelConfig
from trb_megatron.config.reading import (
    is_override,
    load_config,
    load_job_config,
    parse_config,
    save_config,
)
from trb_megatron.config.resume import fingerprint_difference
from trb_megatron.config.values import ConfigError
from trb_megatron.run.commit import git_commit

MINIMAL = """\
run: {dir: runs/a}
student: {path: models/student}
teacher: {path: models/teacher}
data: {path: prompts.jsonl}
"""
SKD = ["behavior.policy=skd", "behavior.skd_top_k=15", "behavior.skd_temperature=0.2"]
SUPERVISED = ["training.task=supervised", "loss.name=cross_entropy", "data.response_column=text"]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_those_of_the_paper(minimal: Path) -> None:
    config = load_config(minimal)
    assert (config.behavior.kl_budget, config.behavior.warmup_steps) == (0.01, 50)
    assert (config.training.steps, config.training.prompts_per_step) == (400, 64)
    assert (config.loss.name, config.loss.top_k) == ("reverse_kl_topk", 16)
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-5, 15)
    assert config.data.system_prompt is not None
    assert config.data.system_prompt.endswith("within \\boxed{}.")


def test_overrides_are_typed_and_later_ones_win(minimal: Path) -> None:
    overrides = [
        "optimizer.lr=3e-4",
        "rollout.stop_ids=[7, 3]",
        "data.system_prompt=null",
        "training.steps=5",
        "training.steps=6",
        "evaluation.sets.gsm8k.path=gsm8k.jsonl",
    ]
    config = load_config(minimal, overrides)
    assert config.optimizer.lr == 3e-4
    assert config.rollout.stop_ids == (7, 3)
    assert config.data.system_prompt is None
    assert config.training.steps == 6
    assert config.evaluation.sets["gsm8k"].path == Path("gsm8k.jsonl")


def test_override_of_an_alias_leaves_the_anchor(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "evaluation: {sets: {a: &a {path: a.jsonl}, b: *a}}\n")
    sets = load_config(minimal, ["evaluation.sets.b.path=b.jsonl"]).evaluation.sets
    assert {name: str(problems.path) for name, problems in sets.items()} == {
        "a": "a.jsonl",
        "b": "b.jsonl",
    }


def test_section_without_keys_has_its_defaults(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "rewards:\n  # workers: 4\n")
    assert load_config(minimal).rewards.workers == 2


def test_nothing_changes_after_loading(minimal: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(minimal).training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rollout.temprature=0.5", "rollout.temperature"),
        ("behaviour.kl_budget=0.1", "behavior"),
        ("optimizer.wieght_decay=1", "optimizer.weight_decay"),
        ("training.kl_budget=0.1", "behavior.kl_budget"),
        ("evaluation.sets.gsm8k.limits=3", "evaluation.sets.NAME.limit"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_one(
    minimal: Path, override: str, nearest: str
) -> None:
    key = override.partition("=")[0]
    unknown = key if not key.startswith("behaviour") else "behaviour"
    with pytest.raises(ConfigError) as error:
        load_config(minimal, [override])
    assert f"{unknown}: unknown key; did you mean {nearest}" in str(error.value)
    assert str(minimal) in str(error.value)


def test_job_that_does_not_train_needs_less(tmp_path: Path) -> None:
    config = load_job_config(None, ["student.path=models/student", "evaluation.temperature=0"])
    assert config.student.path == Path("models/student")
    assert (config.run.seed, config.data.max_prompt_tokens) == (0, 1024)
    assert load_job_config(None, ["student.path=s", "behavior.warmup_steps=0"])  # of training alone
    for overrides, message in (
        ([], "options and overrides:\n  student: required"),
        (["student.path=s", "data.promt_column=x"], "did you mean data.prompt_column"),
        (["student.path=s", "evaluation.pass_at=[2]"], "evaluation.pass_at: pass@2 needs"),
        (["student.path=s", "data={}", "run={dir: 3}"], "run.dir: expected a path"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_job_config(None, overrides)


def test_training_names_all_that_it_needs(minimal: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(minimal, ["run={}", "data={}", "student=null"])
    for key in ("run.dir: required", "data.path: required", "student: required"):
        assert key in str(error.value)
    with pytest.raises(ConfigError, match=r"run\.dir: expected a path"):
        load_config(minimal, ["run.dir=null"])


@pytest.mark.parametrize(
    ("word", "is_one"),
    [("a.b=c", True), ("a.b=", True), ("=c", False), ("runs/lr=3/config.yaml", False), ("a", False),
     ("evaluation.sets.a.path=x/y=z.jsonl", True)],
)  # fmt: skip
def test_overrides_are_told_from_files(word: str, is_one: bool) -> None:
    assert is_override(word) == is_one


def test_every_mistake_is_named_at_once(minimal: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(minimal, ["loss.top_k=0", "training.stesp=3", "student={}"])
    for key in ("loss.top_k", "training.stesp", "student.path: required"):
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {dir: a}\nstudent: [", r"broken\.yaml:2: broken YAML"),
        ("run: {dir: a}\nloss:\n  top_k: 2\n  top_k: 3\n", r"broken\.yaml:4:.*'top_k'.*twice"),
        ("run: {dir: a}\nloss:\n\ttop_k: 2\n", r"broken\.yaml:3:"),
        (
            'run: {dir: a}\ndata:\n  system_prompt: "in \\boxed{}"\n',
            r"broken\.yaml:3: .*holds a backspace, .*unescaped \\boxed .*write \\\\boxed, or put",
        ),
        ('data: {system_prompt: "\\frac{1}{2}"}\n', r"broken\.yaml:1: .* a form feed, .*\\frac"),
        ('data: {system_prompt: "\\vec{x}"}\n', r"broken\.yaml:1: .* a vertical tab, .*\\vec"),
        ('data: {system_prompt: "\\alpha"}\n', r"broken\.yaml:1: .* a bell, .*\\alpha"),
        ("run: {dir: a}\ndata: {path: \x07}\n", r"broken\.yaml:2:"),
        ("- run\n", "expected sections"),
    ],
)
def test_broken_yaml_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_invalid_utf8_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run: {dir: a}\ndata: {path: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not valid UTF-8"):
        load_config(path)


def test_missing_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ConfigError, match="run: required"):
        load_config(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "section.key=value"),
        ("=3", "section.key=value"),
        ("rollout.stop_ids=[1", "broken YAML"),
        ("student.path.name=x", "student.path is a value, not a section"),
        ("training=5", "training:"),
    ],
)
def test_broken_override_is_named(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(minimal, [override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("End with #### and it.", r"line 1: '#### and it\.' is a comment .* in quotes, inside"),
        ("a\n # b", "line 2: '# b' is a comment"),
        ("# all", "line 1: '# all' is a comment"),
        ("'quoted' # b", "is a comment"),
        ("| # b\n a", "is a comment"),
        ("> # b", "is a comment"),
        ("&a x", "line 1: '&a x' is an anchor"),
        ("--- x", "'--- x' is the start of a document"),
        ("x\n...", r"'\.\.\.' is the end of a document"),
        ("%YAML 1.1\n--- x", r"line 1: '%YAML 1\.1.* is a directive"),
        (
            "one\ntwo",
            r"line 1: a line break is a blank in YAML; write it as \\n in .* double quotes",
        ),
        ("'one\ntwo'", "a line break is a blank"),
        ('"one\n\ntwo"', "a line break is a blank"),
        ("!x y", "the tag !x is not supported"),
        ("Solve: x", "system_prompt: input should be a valid string; put quotes around text"),
        ("- x", "put quotes around text"),
        ("007", "put quotes around text"),
    ],
)
def test_text_that_an_override_would_lose_is_refused(minimal: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(minimal, [f"data.system_prompt={text}"])


def test_text_of_an_override_is_the_value_or_refused(minimal: Path) -> None:
    """Whatever words it has; quotes and the words for null keep their meaning."""
    parts = (
        "a",
        "# b",
        "#",
        " ",
        "  ",
        "\n",
        ": ",
        "&c",
        "*",
        "- ",
        "{",
        "]",
        "'",
        '"',
        "\\n",
        "|",
    )
    parts += ("...", "---", "%", "?", "!", "~", "null", "\t", "\r", "\u2028", ">", "@", "`", ",")
    source = random.Random(3)
    num_read = 0
    for _ in range(1500):
        text = "".join(source.choices(parts, k=source.randint(1, 5)))
        try:
            value = load_config(minimal, [f"data.system_prompt={text}"]).data.system_prompt
        except ConfigError:
            continue
        if value is None:
            assert text.strip() in ("", "~", "null"), repr(text)
        elif not text.lstrip().startswith(("'", '"', "|", ">")):
            assert value == text.strip(), repr(text)
            num_read += 1
    assert num_read > 200
    quoted = "data.system_prompt='End with #### & it: [x].'"
    assert load_config(minimal, [quoted]).data.system_prompt == "End with #### & it: [x]."
    several_lines = "evaluation.sets=\n  a:\n    path: a.jsonl\n  b: {path: b.jsonl,\n    limit: 3}"
    assert load_config(minimal, [several_lines]).evaluation.sets["b"].limit == 3
    block = "data.system_prompt=|\n  one # two\n  three\n"
    assert load_config(minimal, [block]).data.system_prompt == "one # two\nthree\n"


@pytest.mark.parametrize(
    "override",
    [
        "behavior.kl_budget=-0.1",
        "behavior.kl_budget=.inf",
        "behavior.kl_budget=.nan",
        "rollout.temperature=-1",
        "rollout.draft_tokens=-1",
        "rollout.draft_tokens=many",
        "rollout.draft_tokens=true",
        "rollout.draft_tokens=1.5",
        "behavior.policy=student",
        "behavior.warmup_steps=-1",
        "behavior.skd_top_k=0",
        "behavior.skd_temperature=0",
        "behavior.skd_temperature=-0.5",
        "evaluation.temperature=-1",
        "loss.temperature=0",
        "loss.top_k=0",
        "loss.name=kl",
        "loss.jsd_weight=1.0",
        "loss.veto_coef=1.5",
        "optimizer.lr=0",
        "optimizer.lr=.inf",
        "optimizer.beta2=1.0",
        "optimizer.clip_grad=-1",
        "training.steps=0",
        "training.steps=true",
        "training.steps=1.5",
        "training.precision=fp16",
        "optimizer.distributed=1",
        "parallel.tensor_model_parallel_size=0",
        "parallel.timeout_minutes=0",
        "rollout.stop_ids=[]",
        "rollout.stop_ids=[-1]",
        "rollout.stop_ids=[5, 5]",
        "evaluation.pass_at=[0]",
        "evaluation.sets.bad name.path=x",
        "rewards.timeout_s=0",
        "run.dir=''",
        "run.seed=-1",
        f"run.seed={2**63}",
        "logging.wandb_project=''",
        "data.prompt_column=''",
    ],
)
def test_value_out_of_range_is_refused_by_its_key(minimal: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        load_config(minimal, [override])
    _, line = str(error.value).split("\n", maxsplit=1)
    assert line.strip().startswith(key.removesuffix(".path"))


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["behavior.warmup_steps=0"], ["behavior.kl_budget", "behavior.warmup_steps"]),
        (["rollout.temperature=0"], ["rollout.temperature", "behavior.kl_budget=0"]),
        ([*SKD, "behavior.warmup_steps=0"], ["behavior.warmup_steps: 0", "behavior.policy=trb"]),
        ([*SKD, "rollout.temperature=0"], ["rollout.temperature: 0", "behavior.policy=skd"]),
        (
            ["behavior.policy=teacher", "rollout.temperature=0"],
            ["rollout.temperature: 0", "behavior.policy=teacher"],
        ),
        ([*SKD, "behavior.kl_budget=0"], ["behavior.kl_budget: 0", "behavior.policy=skd"]),
        (["behavior.skd_top_k=15"], ["behavior.skd_top_k", "behavior.policy=skd"]),
        (
            ["behavior.policy=teacher", "behavior.skd_temperature=0.2"],
            ["behavior.skd_temperature", "behavior.policy=teacher", "behavior.policy=skd"],
        ),
        (["teacher=null"], ["teacher.path", "training.task=distill"]),
        (["loss.name=cross_entropy"], ["loss.name", "training.task=supervised"]),
        (["training.task=supervised", "data.response_column=r"], ["loss.name=cross_entropy"]),
        (["training.task=supervised", "loss.name=cross_entropy"], ["data.response_column"]),
        (["parallel.sequence_parallel=true"], ["parallel.tensor_model_parallel_size=1"]),
        (["data.apply_chat_template=false"], ["data.system_prompt=null"]),
        (["loss.veto_coef=0.2"], ["loss.veto_coef", "loss.name=veto"]),
        (["evaluation.pass_at=[1, 8]", "evaluation.samples=4"], ["pass@8", "evaluation.samples"]),
        (["evaluation.temperature=0", "evaluation.samples=2"], ["evaluation.samples=1"]),
    ],
)
def test_impossible_combination_names_keys_and_fix(
    minimal: Path, overrides: list[str], keys: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(minimal, overrides)
    for key in keys:
        assert key in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["behavior.kl_budget=0", "behavior.warmup_steps=0"],
        ["behavior.kl_budget=0", "rollout.temperature=0"],
        [*SKD, "behavior.warmup_steps=15"],
        ["behavior.policy=teacher", "behavior.kl_budget=0.05"],
        ["rollout.draft_tokens=0"],
        ["rollout.draft_tokens=auto"],
        ["evaluation.temperature=0"],
        ["loss.name=veto", "loss.veto_coef=0.8"],
        ["teacher=null", *SUPERVISED],
        [*SUPERVISED, "rollout.temperature=0"],
        ["data.apply_chat_template=false", "data.system_prompt=null"],
        ["parallel.sequence_parallel=true", "parallel.tensor_model_parallel_size=2"],
        ["evaluation.pass_at=[1, 8]", "evaluation.samples=8"],
    ],
)
def test_possible_combination_is_accepted(minimal: Path, overrides: list[str]) -> None:
    load_config(minimal, overrides)


def test_world_size(minimal: Path) -> None:
    overrides = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=3"]
    config = load_config(minimal, overrides)
    check_world_size(config.parallel, 12)
    with pytest.raises(ConfigError, match=r"8 ranks.*tensor_model_parallel_size=2.*= 6 ranks"):
        check_world_size(config.parallel, 8)


def test_same_student_and_teacher_is_a_warning(minimal: Path) -> None:
    assert config_warnings(load_config(minimal)) == []
    (warning,) = config_warnings(load_config(minimal, ["teacher.path=models/x/../student"]))
    assert "student.path and teacher.path" in warning


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["teacher=null", *SUPERVISED],
        ["data.system_prompt='Denke: \"\\boxed{} – schön\"'", "optimizer.eps=1e-8"],
        ["evaluation.sets.a.path=x.jsonl", "rollout.stop_ids=[3, 1]", "training.steps=7"],
    ],
)
def test_saved_configuration_reads_back_equal(
    minimal: Path, tmp_path: Path, overrides: list[str]
) -> None:
    config = load_config(minimal, overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert {p.name for p in tmp_path.iterdir()} == {"minimal.yaml", "config.yaml"}


def test_failed_save_leaves_the_previous_file(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(minimal)
    path = tmp_path / "config.yaml"
    save_config(config, path)

    def fill_disk(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode(encoding)[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        save_config(load_config(minimal, ["training.steps=7"]), path)
    assert load_config(path) == config


CHANGEABLE = [
    "student.path=other",
    "teacher.path=other",
    "data.path=other",
    "run.dir=runs/b",
    "parallel.tensor_model_parallel_size=2",
    "training.steps=7",
    "training.max_tokens_per_microbatch=99",
    "rollout.max_sequences=3",
    "rollout.page_tokens=8",
    "checkpoint.every=3",
    "evaluation.samples=3",
    "evaluation.sets.a.path=x",
    "rewards.workers=5",
    "logging.tensorboard=false",
]
FIXED = [
    "run.seed=1",
    "data.split=other",
    "data.chat_template_kwargs={enable_thinking: false}",
    "training.prompts_per_step=3",
    "training.precision=fp32",
    "rollout.temperature=0.9",
    "behavior.kl_budget=0.02",
    "behavior.warmup_steps=51",
    "behavior.policy=teacher",
    "loss.top_k=8",
    "optimizer.lr=1e-4",
]


def test_fingerprint_ignores_what_may_change_at_a_resume(minimal: Path) -> None:
    saved, now = load_config(minimal), load_config(minimal, CHANGEABLE)
    assert fingerprint_difference(saved, now) == []


def test_steps_belong_to_a_run_whose_loss_decays_over_them(minimal: Path) -> None:
    veto = ["loss.name=veto", "loss.veto_coef=0.4"]
    saved = load_config(minimal, [*veto, "training.steps=10"])
    now = load_config(minimal, [*veto, "training.steps=20"])
    assert fingerprint_difference(saved, now) == ["training.steps: saved 10, now 20"]


@pytest.mark.parametrize("override", FIXED)
def test_fingerprint_tells_runs_apart_and_names_the_key(minimal: Path, override: str) -> None:
    saved, now = load_config(minimal), load_config(minimal, [override])
    (difference,) = fingerprint_difference(saved, now)
    assert difference.startswith(override.partition("=")[0] + ": saved ")


def test_teacher_that_is_not_used_may_go(minimal: Path) -> None:
    saved = load_config(minimal, SUPERVISED)
    now = load_config(minimal, [*SUPERVISED, "teacher=null"])
    assert fingerprint_difference(saved, now) == []


def test_every_loss_name_can_be_configured() -> None:
    names = yaml.safe_load(
        "[reverse_kl_topk, reverse_kl_topk_policy_gradient, reverse_kl_full, reverse_kl_sampled,"
        " forward_kl_full, jsd, veto]"
    )
    for name in names:
        assert parse_config(_values(loss={"name": name})).loss.name == name


def test_home_directory_is_expanded() -> None:
    config = parse_config(_values(student={"path": "~/model"}))
    assert config.student.path == Path.home() / "model"


def _values(**sections: Any) -> dict[str, Any]:
    return {**yaml.safe_load(MINIMAL), **sections}


def test_configuration_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"(?s)^configuration:.*loss\.top_k"):
        parse_config(_values(loss={"top_k": 0}))
    assert isinstance(parse_config(_values()), Config)


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_the_package_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "package" / "config.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("TRB_COMMIT", "of the image")
    assert git_commit(tmp_path) == "of the image"
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "-m", "first")
    _git(tmp_path, "tag", "-a", "v1", "-m", "annotated")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    source.write_text("a = 2\n")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_expert_parallelism_is_refused() -> None:
    with pytest.raises(ValueError, match="expert parallelism is not built yet; tensor parallel"):
        ParallelConfig(expert_model_parallel_size=2)
