"""A Slurm site for measurements and tests: compute nodes, a login node with sshd, and a laptop that reaches that one alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.harness.hosts import REPOSITORY, Host, hosts
from bench.harness.slurm import Slurm, slurm
from tandem.cluster.slurm.folder import JobFolder, find


@dataclass(frozen=True, kw_only=True)
class Site:
    """A Slurm cluster, its login node, and a laptop."""

    slurm: Slurm
    nodes: list[Host]
    login: Host
    shared: Path
    """A folder that all hosts see; TANDEM_HOME of the cluster is `home` in it."""
    laptop: Path
    """TANDEM_HOME of the laptop, which sees nothing of the cluster's files."""

    @property
    def home(self) -> Path:
        """TANDEM_HOME of the cluster."""
        return self.shared / "home"

    def tandem(self, *words: str, **variables: str) -> str:
        """Output of a command on the login node; AssertionError with it if the command fails."""
        result = self.run(*words, **variables)
        assert result.returncode == 0, result.stdout[-6000:] + self.output()
        return result.stdout

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node."""
        return subprocess.run(
            [sys.executable, "-m", "tandem", *words],
            env={**os.environ, **self.slurm.environment, "TANDEM_HOME": str(self.home), "COLUMNS": "200", **variables},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
        )  # fmt: skip

    def on_laptop(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python on the laptop, which reaches the login node by ssh alone."""
        return subprocess.run(
            [sys.executable, *words], env={**os.environ, "TANDEM_HOME": str(self.laptop), **variables},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    def output(self) -> str:
        """The end of the newest job's output."""
        with contextlib.suppress(Exception):
            return find(self.home, "latest").log.read_text()[-6000:]
        return ""

    def job_failed(self) -> bool:
        """Whether the newest job says that it has failed."""
        return self.job().connection().state == "failed"

    def job(self) -> JobFolder:
        """The folder of the newest job."""
        return find(self.home, "latest")

    @contextlib.contextmanager
    def tunnel(self, port: int) -> Iterator[subprocess.Popen[str]]:
        """`tandem slurm tunnel` on the laptop."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem", "slurm", "tunnel", self.job().submission().job_id or "", "--port", str(port)],
            env={**os.environ, "TANDEM_HOME": str(self.laptop), "COLUMNS": "200"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            shown = process.stdout.readline()
            assert f"http://127.0.0.1:{port}/v1" in shown, shown + process.stdout.read()
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)


@contextlib.contextmanager
def slurm_site(folder: Path, *, nodes: int) -> Iterator[Site]:
    """A site for the length of a block, with all its files in `folder`. UnavailableError where this machine cannot have one."""
    shared, laptop = folder / "shared", folder / "laptop"
    shared.mkdir(parents=True)
    for home in (shared / "home", laptop):
        home.mkdir(mode=0o700)
    with hosts(nodes + 1, folder / "hosts", [shared]) as (*compute, login), slurm(compute, shared / "slurm") as cluster:
        (shared / "home" / "slurm.yaml").write_text("cpus_per_node: 2\nwarning_s: 30\n")
        (folder / "ssh").write_text(
            f"Host *\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n IdentityFile {login.key}\n"
            " BatchMode yes\n SendEnv SLURM_CONF\n"
        )
        command = shared / "tandem"
        command.write_text(
            f"#!/bin/sh\nexport TANDEM_HOME={shared}/home PYTHONPATH={REPOSITORY}/platform\n"
            f'exec {sys.executable} -m tandem "$@"\n'
        )
        command.chmod(0o755)
        login_config = f"{{host: root@{login.address}, config: {folder}/ssh, tandem: {command}}}"
        (laptop / "slurm.yaml").write_text(f"login: {login_config}\n")
        yield Site(slurm=cluster, nodes=compute, login=login, shared=shared, laptop=laptop)
