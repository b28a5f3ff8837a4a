"""The sbatch files without a cluster: stand-ins for SLURM's commands note what they were asked."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SBATCH_FILES = ("train.sbatch", "evaluate.sbatch", "convert.sbatch")

STAND_INS = {
    "srun": """
        [[ "$*" == *--overlap* ]] && exit "$PROBE_STATUS"
        printf '%s\\n' "$@" > "$FOLDER/options"
        for ((i = 0; i < 3000; i++)); do
            [[ $RANKS == *-at-once || -e $TRB_STOP_FILE ]] && break
            /bin/sleep 0.01
        done
        [[ $RANKS == stop ]] && echo "stopped by a file" > "$TRB_STOP_FILE"
        [[ $RANKS == preempt* ]] && echo "stopped by SIGTERM" > "$TRB_STOP_FILE"
        [[ $RANKS != fail* ]]
    """,
    "scontrol": """
        echo "$@" >> "$FOLDER/scontrol"
        echo "NodeAddr=10.1.2.3 NodeHostName=node7"
    """,
    "sleep": 'echo "$@" > "$FOLDER/sleep"',
}


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """What the batch script of a job on two nodes of four GPUs finds in its environment."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (commands / name).chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "RANKS": "finish-at-once",
        "PROBE_STATUS": "0",
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURMD_NODENAME": "node7",
    }


def start(sbatch: str, variables: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", f"launch/{sbatch}", *arguments],
        cwd=REPOSITORY,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def srun_options(sbatch: str, variables: dict[str, str], *arguments: str) -> list[str]:
    """Run a file to its end; what it gave to srun."""
    job = start(sbatch, variables, *arguments)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    return (Path(variables["FOLDER"]) / "options").read_text().splitlines()


def test_ranks_of_all_nodes_meet_on_the_first(variables: dict[str, str]) -> None:
    options = srun_options("train.sbatch", variables, "run.yaml", "run.dir=a b")
    assert options[options.index("python") :] == [
        *("python", "-m", "trb_megatron.launch", "--nnodes=2", "--nproc-per-node=4"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=10.1.2.3:22345", "--rdzv-id=12345.0"),
        *("-m", "trb_megatron.train", "run.yaml", "run.dir=a b"),
    ]
    restarted = srun_options("train.sbatch", variables | {"SLURM_RESTART_COUNT": "2"})
    assert "--rdzv-id=12345.2" in restarted


@pytest.mark.parametrize("sbatch", SBATCH_FILES)
def test_container_is_used_where_one_is_named(sbatch: str, variables: dict[str, str]) -> None:
    arguments = ("inspect_checkpoint", "runs/x")
    assert not any("container" in option for option in srun_options(sbatch, variables, *arguments))
    image = {"CONTAINER_IMAGE": "/images/trb.sqsh", "CONTAINER_MOUNTS": "/models:/models"}
    options = srun_options(sbatch, variables | image, *arguments)
    assert [option for option in options if "container" in option] == [
        "--container-image=/images/trb.sqsh",
        f"--container-mounts={REPOSITORY}:{REPOSITORY},/models:/models",
        f"--container-workdir={REPOSITORY}",
    ]


@pytest.mark.parametrize(
    ("ranks", "sent", "status", "requeued"),
    [
        ("stop", signal.SIGUSR1, 0, True),
        ("finish", signal.SIGUSR1, 0, False),  # the last step was done meanwhile
        ("fail", signal.SIGUSR1, 1, False),
        ("stop", signal.SIGTERM, 0, False),
        ("fail-at-once", None, 1, False),
    ],
)
def test_only_a_run_stopped_by_the_time_limit_is_requeued(
    ranks: str, sent: signal.Signals | None, status: int, requeued: bool, variables: dict[str, str]
) -> None:
    folder = Path(variables["FOLDER"])
    job = start("train.sbatch", variables | {"RANKS": ranks})
    wait_until((folder / "options").exists, "srun", 60)
    if sent is not None:
        job.send_signal(sent)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == status, output
    asked = (folder / "scontrol").read_text()
    assert ("requeue 12345" in asked) == requeued
    assert (folder / "sleep").exists() == requeued
    assert not (REPOSITORY / ".stop-12345.0").exists()


def test_script_of_a_preempted_job_waits_for_slurm(variables: dict[str, str]) -> None:
    job = start("train.sbatch", variables | {"RANKS": "preempt-at-once"})
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "preempted" in output
    assert (Path(variables["FOLDER"]) / "sleep").read_text() == "600\n"
    assert "requeue" not in (Path(variables["FOLDER"]) / "scontrol").read_text()


def test_script_waits_for_slurm_when_a_node_does_not_answer(variables: dict[str, str]) -> None:
    job = start("train.sbatch", variables | {"RANKS": "fail-at-once", "PROBE_STATUS": "1"})
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "a node does not answer" in output
    assert (Path(variables["FOLDER"]) / "sleep").read_text() == "1200\n"


@pytest.mark.parametrize("sbatch", SBATCH_FILES)
def test_environment_is_a_list_of_names(sbatch: str) -> None:
    (names,) = re.findall(
        r"^#SBATCH --export=(\S+)$", (REPOSITORY / "launch" / sbatch).read_text(), re.M
    )
    assert not {"ALL", "NONE"} & set(names.split(","))
    assert not re.search(r"KEY|TOKEN|SECRET|PASSW", names)
