"""A Slurm cluster in one folder, on this machine alone: munge, slurmctld and a slurmd for each node, on loopback.

All of it (key, sockets, state, logs) is in the folder; nothing is read from or written to /etc, /var or /run.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=20
MinJobAge=600
ReturnToService=2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=15
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=2000 State=UNKNOWN\n"


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


class Cluster:
    """Two nodes, n0 and n1, of four processors each, whatever the machine has; stop it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        (folder / "state").mkdir(parents=True)
        folder.parent.chmod(0o755)
        (folder / "plugstack.conf").touch()
        ports = free_ports(3)
        nodes = "".join(NODE.format(name=f"n{i}", host=host, port=ports[i + 1]) for i in range(2))
        (folder / "slurm.conf").write_text(CONF.format(host=host, port=ports[0], user=user, folder=folder, nodes=nodes))

    def start(self) -> None:
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {name: f"{folder}/munge.{name}" for name in ("sock", "pid", "log", "seed")}
        options = zip(("--socket", "--pid-file", "--log-file", "--seed-file"), files.values(), strict=True)
        self.run("munged", f"--key-file={key}", *(f"{option}={file}" for option, file in options))
        self.run("slurmctld", "-i")
        for node in ("n0", "n1"):
            self.run("slurmd", "-N", node)
        wait_for(
            "both nodes", lambda: self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%t").split() == ["idle"] * 2, 120
        )

    def run(self, *command: str) -> str:
        """What a command prints. Daemons keep no pipe of ours."""
        if command[0] in ("munged", "slurmctld", "slurmd"):
            subprocess.run(command, env=self.env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return ""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """The job's number."""
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])
        fixed = ("--parsable", f"--chdir={self.folder}", f"--export={exported}", "--cpus-per-task=1")
        return self.run("sbatch", *fixed, *options, str(script), *arguments).strip()

    def field(self, job: str, name: str) -> list[str]:
        """A field of `scontrol show job`, for each task of the job."""
        lines = self.run("scontrol", "-o", "show", "job", job).splitlines()
        return [word.partition("=")[2] for line in lines for word in line.split() if word.startswith(f"{name}=")]

    def states(self, job: str) -> set[str]:
        return set(self.field(job, "JobState"))

    def wait(self, job: str, *states: str, seconds: float = 900) -> None:
        """Until all tasks of the job are in one of these states."""
        wait_for(f"{states} of job {job}", lambda: self.states(job) <= set(states), seconds)

    def restarts(self, job: str) -> int:
        return sum(int(number) for number in self.field(job, "Restarts"))

    def stop(self) -> None:
        """Ends the jobs, then the daemons, each by its own process id."""
        jobs = self.run("squeue", "-h", "-o", "%A").split() if (self.folder / "slurmctld.pid").exists() else []
        if jobs:
            self.run("scancel", "--signal=KILL", "--full", *jobs)
            self.run("scancel", *jobs)
            wait_for("end of all jobs", lambda: not self.run("squeue", "-h").strip(), 60)
        for name in ("slurmd.n0.pid", "slurmd.n1.pid", "slurmctld.pid", "munge.pid"):
            end(self.folder / name)


def end(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    until = time.monotonic() + 20
    while alive(pid):
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(what: str, test: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < until, f"no {what} after {seconds:g} s"
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
