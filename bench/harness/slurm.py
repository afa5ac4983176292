"""A Slurm cluster on hosts in network namespaces: a real controller on this machine, and a daemon on each host."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.hosts import REPOSITORY, SUBNET, Host

GPUS = 2
START_S = 30.0
CONFIG = """\
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=30
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm:
    """A running cluster."""

    config: Path
    hosts: Sequence[Host]

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Slurm's commands find it."""
        return {"SLURM_CONF": str(self.config)}

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True, timeout=60
        ).stdout


@contextlib.contextmanager
def slurm(hosts: Sequence[Host], folder: Path) -> Iterator[Slurm]:
    """A cluster of these hosts, with two GPUs each that are only names. `folder` is shared with them."""
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        subprocess.run([str(REPOSITORY / "scripts" / "install-test-servers"), "slurm"], check=True, timeout=300)
    folder.mkdir(parents=True)
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=12000 Gres=gpu:{GPUS}" for host in hosts
    )
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(controller=socket.gethostname(), address=f"{SUBNET}.1", folder=folder, nodes=nodes))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    found = Slurm(config=config, hosts=hosts)
    with _munge(), _controller(found, folder):
        for host in hosts:
            host.run(f"SLURM_CONF={config} /usr/sbin/slurmd -N {host.name}")
        deadline = time.monotonic() + START_S
        while found.run("sinfo", "--noheader", "--format=%T").split() != ["idle"]:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)
        yield found


@contextlib.contextmanager
def _munge() -> Iterator[None]:
    """The daemon that signs Slurm's messages, unless one runs."""
    socket_path = Path("/run/munge/munge.socket.2")
    if socket_path.exists() and subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        yield
        return
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
    daemon = subprocess.Popen(
        ["runuser", "-u", "munge", "--", "/usr/sbin/munged", "--foreground", "--force"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while not socket_path.exists():
            assert time.monotonic() < deadline, "munged did not start"
            time.sleep(0.1)
        yield
    finally:
        daemon.terminate()
        daemon.wait(10)


@contextlib.contextmanager
def _controller(found: Slurm, folder: Path) -> Iterator[None]:
    daemon = subprocess.Popen(
        ["/usr/sbin/slurmctld", "-D"],
        env={**os.environ, **found.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], env={**os.environ, **found.environment}, check=False)
        daemon.terminate()
        daemon.wait(30)
