"""Slurm on loopback: munged, slurmctld and one slurmd for each of a few nodes, which are all this machine.

A node claims 64 cores and 8 GPUs, as the scripts of launch/cluster/slurm ask for. Needs root and Debian's packages
slurmctld, slurmd, slurm-client and munge (3 MB, installed in seconds).
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from run_support import free_port, until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
STOP_S = 30.0


def why_not() -> str:
    """Why Slurm cannot run here; "" if it can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (apt-get install slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """A running Slurm; its commands get `environment`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def call(self, *words: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run a command of Slurm; return what it prints."""
        done = subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            env={**self.environment, **environment},
            cwd=cwd,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """JobState of the first component of a job."""
        words = self.call("scontrol", "show", "job", job, check=False).split()
        return next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), "")


@contextmanager
def loopback_slurm(nodes: int) -> Iterator[Slurm]:
    """Start Slurm; at the end all its jobs and daemons are gone."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))  # a short path, for sockets
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        _configure(folder, nodes)
        slurm = Slurm(folder, environment)
        daemons = [["munged", "--foreground", "--force", *_munge(folder)], ["slurmctld", "-D", "-c"]]
        daemons += [["slurmd", "-D", "-N", f"node{number}"] for number in range(nodes)]
        for number, words in enumerate(daemons):
            output = stack.enter_context((folder / f"{words[0]}-{number}.log").open("wb"))
            process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
            stack.callback(_stop, process)
            if words[0] == "munged":
                until((folder / "munge.socket").exists, "munged's socket")
        idle = "--states=idle", "--noheader", "--format=%D"
        until(lambda: slurm.call("sinfo", *idle, check=False).strip() == str(nodes), "all nodes of Slurm to be idle")
        stack.callback(_cancel_all, slurm)
        yield slurm


def _cancel_all(slurm: Slurm) -> None:
    slurm.call("scancel", "--user=root", check=False)
    until(lambda: not slurm.call("squeue", "--noheader").strip(), "end of all jobs of Slurm")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _munge(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    names = {"key": key, "socket": folder / "munge.socket", "pid": folder / "munge.pid", "log": folder / "munge.log"}
    return [
        f"--key-file={names['key']}",
        f"--socket={names['socket']}",
        f"--pid-file={names['pid']}",
        f"--seed-file={folder / 'munge.seed'}",
    ]


def _configure(folder: Path, nodes: int) -> None:
    """Write slurm.conf and gres.conf. A requeued job may start again after cred_expire seconds."""
    host = socket.gethostname().partition(".")[0]
    node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000 Gres=gpu:8 State=UNKNOWN"
    lines = [
        "ClusterName=loopback",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
        "SlurmUser=root",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        "ProctrackType=proctrack/pgid",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SchedulerParameters=bf_interval=1",  # heterogeneous jobs are started by the backfill scheduler alone
        "SlurmdParameters=config_overrides",  # nodes claim more cores than this machine has
        "KillWait=120",
        "GresTypes=gpu",
        *(f"NodeName=node{number} Port={free_port()} {node}" for number in range(nodes)),
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=node[0-{nodes - 1}] Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "state").mkdir()
