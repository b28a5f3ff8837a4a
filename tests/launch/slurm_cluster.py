"""A real SLURM cluster of three nodes, on the loopback interface of one machine."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3")
PACKAGES = ("slurm-wlm", "munge")

# Nodes have the GPUs and the memory that the sbatch files ask for, on paper. A requeued job waits
# for credentials to expire (cred_expire); a node counts as lost after SlurmdTimeout; OverTimeLimit
# leaves a slow machine more time after the signal that comes before a time limit, GraceTime after
# preemption by a job of the partition "urgent".
_SLURM_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
MinJobAge=300
FirstJobId={first_job_id}
SlurmdTimeout=10
KillWait=5
OverTimeLimit=2
InactiveLimit=0
NodeName=DEFAULT CPUs=16 RealMemory=65536 Gres=gpu:1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2_port}
NodeName=n3 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n3_port}
PartitionName=all Nodes=n1,n2,n3 Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2,n3 PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


_FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")


class SlurmUnavailable(Exception):
    """Why there can be no cluster on this machine."""


def install() -> None:
    """Install SLURM and munge by apt-get, unless they are there.

    Raises:
        SlurmUnavailable: this process is not root, or the packages cannot be installed.
    """
    if os.geteuid() != 0:
        raise SlurmUnavailable("a SLURM cluster of this test's own needs root")
    if shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged"):
        return
    if shutil.which("apt-get") is None:
        raise SlurmUnavailable(f"no apt-get to install {' and '.join(PACKAGES)} with")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "--quiet", *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            last_line = (done.stdout.strip() or "no output").splitlines()[-1]
            raise SlurmUnavailable(f"apt-get {command[0]} failed: {last_line}")


class SlurmCluster:
    """munged, slurmctld and one slurmd for each of NODES, with all their files in one folder.

    A context manager: entering starts everything and waits until the nodes are idle, leaving ends
    all jobs and daemons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        with ExitStack() as stack:
            stack.callback(self._stop)
            self._write_files()
            munged = ["munged", "--force", f"--socket={self.folder}/munge.socket"]
            munged += [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid")]
            munged += [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("log", "seed")]
            self._start(munged)
            self._start(["slurmctld", "-i"])
            for node in NODES:
                (self.folder / f"spool-{node}").mkdir()
                self._start(["slurmd", "-N", node])
            wait_until(lambda: self.run("sinfo", "-h", "-o", "%T %D") == "idle 3", "idle nodes", 30)
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _write_files(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = dict(zip(("slurmctld", *NODES), _free_ports(1 + len(NODES)), strict=True))
        (self.folder / "slurm.conf").write_text(
            _SLURM_CONF.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                # The port of a job's rendezvous follows from its id.
                first_job_id=1 + secrets.randbelow(9000),
                **{f"{daemon}_port": port for daemon, port in ports.items()},
            )
        )
        (self.folder / "gpu0").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu0\n")

    def _start(self, command: list[str]) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=60)

    def kill_node(self, node: str) -> None:
        """End a node as a power failure does: its slurmd and all that runs there, by SIGKILL.

        It does not come back: for a minute, SLURM would end new jobs there for having the old ids.
        """
        slurmd = int((self.folder / f"slurmd-{node}.pid").read_text())
        place = {"SLURMD_NODENAME": node, "SLURM_CONF": self.environment["SLURM_CONF"]}
        victims = {slurmd}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if place.items() <= process.environ().items():
                    victims.add(process.pid)
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        victims.add(parent.pid)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _stop(self) -> None:
        pid_files = [self.folder / f"slurmd-{node}.pid" for node in NODES]
        pid_files += [self.folder / "slurmctld.pid", self.folder / "munge.pid"]
        if (self.folder / "slurmctld.pid").exists():
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.run("scancel", *jobs)
                wait_until(lambda: not self.run("squeue", "-h"), "the end of all jobs")
        for file in pid_files:
            with suppress(FileNotFoundError, psutil.NoSuchProcess):
                daemon = psutil.Process(int(file.read_text()))
                daemon.terminate()
                daemon.wait(20)

    def run(self, *command: str, **variables: str) -> str:
        """Output of a command, such as squeue, without the newline at its end."""
        done = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, *arguments: str, **variables: str) -> str:
        """`sbatch` with further environment variables; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **variables)

    def job(self, job_id: str) -> Mapping[str, str]:
        """What `scontrol show job` says, by field."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for(self, job_id: str, **wanted: str) -> None:
        """Wait until fields of a job have the wanted values.

        Raises:
            AssertionError: the job ended otherwise; shows the end of its output.
        """

        def is_as_wanted() -> bool:
            job = self.job(job_id)
            if wanted.items() <= job.items():
                return True
            if job["JobState"] in _FINAL_STATES:
                found = {name: job[name] for name in ("JobState", "ExitCode", "Restarts")}
                output = Path(job["StdOut"]).read_text()[-5000:]
                raise AssertionError(f"job {job_id} ended with {found}, not {wanted}:\n{output}")
            return False

        wait_until(is_as_wanted, f"job {job_id} with {wanted}")

    def environments(self, job_id: str) -> list[Mapping[str, str]]:
        """Environment variables of each process of a running job."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                if variables.get("SLURM_JOB_ID") == job_id:
                    found.append(variables)
        return found


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 240) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: it did not within the time; names `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
