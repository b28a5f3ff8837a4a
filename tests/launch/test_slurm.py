"""Jobs on a real SLURM: time limits, preemption, cancellation, lost nodes and failures."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster, SlurmUnavailable, install, wait_until
from tests.layouts import write_inputs
from tests.runs import weights_digest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 40
SECRET = "a-key-from-the-submitting-shell"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    try:
        install()
    except SlurmUnavailable as reason:
        pytest.skip(str(reason))
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


class Job:
    """A submitted sbatch file of launch/ and its run folder, on two nodes of one rank each."""

    def __init__(
        self, cluster: SlurmCluster, sbatch: str, folder: Path, *arguments: str, **options: str
    ) -> None:
        self.cluster = cluster
        self.folder = folder
        self.log_file = folder / "log"
        folder.mkdir()
        given = {"nodes": "2", "gpus-per-node": "1", "output": str(self.log_file)} | options
        self.id = cluster.submit(
            *(f"--{name}={value}" for name, value in given.items()),
            f"--chdir={REPOSITORY}",
            str(REPOSITORY / "launch" / sbatch),
            *arguments,
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            WANDB_API_KEY=SECRET,
        )

    @classmethod
    def train(
        cls, cluster: SlurmCluster, config_file: Path, folder: Path, *overrides: str, **options: str
    ) -> "Job":
        """A training run of STEPS steps that saves only at its end or when it is stopped."""
        defaults = (f"run.dir={folder}/run", f"training.steps={STEPS}", "checkpoint.every=1000")
        return cls(
            cluster, "train.sbatch", folder, str(config_file), *defaults, *overrides, **options
        )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    def wait_for_step(self, step: int) -> None:
        """Wait until a training run has recorded a step."""
        metrics = self.folder / "run/metrics.jsonl"

        def is_there() -> bool:
            assert self.cluster.job(self.id)["JobState"] != "FAILED", self.log
            return metrics.exists() and f'"step": {step},' in metrics.read_text()

        wait_until(is_there, f"step {step}")

    def wait_for_restart(self, count: int) -> None:
        """Wait until a training run was resumed a number of times and has done a step since."""
        wait_until(lambda: len(self.resumed_at()) == count, f"restart {count}")
        self.wait_for_step(self.resumed_at()[-1] + 1)

    def signal_script(self, name: str) -> None:
        """Send a signal to the batch script alone, as --signal=B: does."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.id)

    def resumed_at(self) -> list[int]:
        """The steps of the checkpoints that it went on from."""
        return [int(step) for step in re.findall(r"resumed from .*/step_(\d+)", self.log)]


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, config_file: Path) -> str:
    """Digest of the weights of a run that nothing happened to."""
    job = Job.train(cluster, config_file, config_file.parent / "undisturbed")
    cluster.wait_for(job.id, JobState="COMPLETED", Restarts="0")
    assert "resumed" not in job.log
    return weights_digest(job.folder / "run/hf")


def test_signal_before_the_time_limit_saves_and_requeues(
    cluster: SlurmCluster, config_file: Path, undisturbed: str, tmp_path: Path
) -> None:
    job = Job.train(cluster, config_file, tmp_path / "job")
    job.wait_for_step(3)
    environments = cluster.environments(job.id)
    assert len(environments) >= 4  # the script, srun, two ranks
    assert not any(SECRET in variables.values() for variables in environments)
    job.signal_script("USR1")
    cluster.wait_for(job.id, JobState="COMPLETED", Restarts="1")
    (step,) = job.resumed_at()
    assert 3 <= step < STEPS
    assert weights_digest(tmp_path / "job/run/hf") == undisturbed
    assert not list(REPOSITORY.glob(f".stop-{job.id}.*"))


def test_run_goes_on_after_a_node_is_lost(
    cluster: SlurmCluster, config_file: Path, undisturbed: str, tmp_path: Path
) -> None:
    job = Job.train(cluster, config_file, tmp_path / "job", "checkpoint.every=5")
    job.wait_for_step(8)
    assert cluster.job(job.id)["NodeList"] == "n[1-2]"
    cluster.kill_node("n2")
    cluster.wait_for(job.id, JobState="COMPLETED", Restarts="1")
    assert cluster.job(job.id)["NodeList"] == "n[1,3]"
    (step,) = job.resumed_at()
    assert step in (5, 10, 15)
    assert weights_digest(tmp_path / "job/run/hf") == undisturbed


def test_time_limit_preemption_and_cancellation_of_a_long_run(
    cluster: SlurmCluster, config_file: Path, tmp_path: Path
) -> None:
    job = Job.train(
        cluster,
        config_file,
        tmp_path / "job",
        "training.steps=100000",
        time="1",
        signal="B:USR1@5",
    )
    wait_until(lambda: job.restarts == 1, "requeueing before the time limit")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait_for_restart(1)

    cluster.submit("--partition=urgent", "--nodelist=n1", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: job.restarts == 2, "requeueing after preemption")
    job.wait_for_restart(2)
    assert "stopped by SIGTERM" in job.log

    job.signal_script("TERM")
    cluster.wait_for(job.id, JobState="COMPLETED", Restarts="2")
    checkpoints = (tmp_path / "job/run/checkpoints").glob("step_*")
    last_step = max(int(folder.name.removeprefix("step_")) for folder in checkpoints)
    assert job.resumed_at()[-1] < last_step < 100_000


def test_failing_job_ends_as_failed_with_its_reason_first(
    cluster: SlurmCluster, config_file: Path, tmp_path: Path
) -> None:
    job = Job.train(cluster, config_file, tmp_path / "job", "training.stepps=7")
    cluster.wait_for(job.id, JobState="FAILED", Restarts="0")
    first_error = job.log[job.log.index("error") :].splitlines()
    assert first_error[0].startswith("error: ")
    assert "training.stepps" in first_error[1]
    assert "Traceback" not in job.log


def test_evaluation_and_conversion(
    cluster: SlurmCluster, config_file: Path, tmp_path: Path
) -> None:
    inputs = config_file.parent
    evaluation = Job(
        cluster,
        "evaluate.sbatch",
        tmp_path / "evaluation",
        str(config_file),
        f"evaluation.sets={{sums: {{path: {inputs}/prompts.jsonl}}}}",
        nodes="1",
    )
    conversion = Job(
        cluster,
        "convert.sbatch",
        tmp_path / "conversion",
        "hf_to_megatron",
        str(inputs / "student"),
        str(tmp_path / "converted"),
        **{"nodes": "1", "gpus-per-node": "0"},
    )
    for job in (evaluation, conversion):
        cluster.wait_for(job.id, JobState="COMPLETED")
    assert "eval/sums/pass@1" in evaluation.log
    assert (tmp_path / "converted").is_dir()
