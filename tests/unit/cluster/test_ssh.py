"""SSH connections with a program in the place of `ssh` that answers, fails or hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cluster.process import run_program
from tandem.cluster.ssh import SshConnection
from tandem.config.ssh import SshConfig
from tandem.errors import ClusterError


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program in the place of `ssh`; a test writes its shell script."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program = tmp_path / "ssh"
    program.touch(mode=0o755)
    return program


def test_a_command_that_hangs_is_named_with_its_seconds_and_the_next_step(ssh: Path) -> None:
    ssh.write_text("#!/bin/sh\nexec sleep 20\n")
    connection = SshConnection(SshConfig(host="ann@gate"))
    with pytest.raises(
        ClusterError, match=r"`slurm info 7` on ann@gate did not end within 0\.2 s\. `ssh ann@gate` shows"
    ):
        connection.run("slurm info 7", timeout_s=0.2)


def test_a_command_that_fails_is_told_with_what_it_said(ssh: Path) -> None:
    ssh.write_text("#!/bin/sh\necho 'no such job' >&2; exit 1\n")
    with pytest.raises(ClusterError, match="`slurm info 7` failed on ann@gate: no such job"):
        SshConnection(SshConfig(host="ann@gate")).run("slurm info 7")


def test_a_block_opens_and_closes_the_connection(ssh: Path, tmp_path: Path) -> None:
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n')
    with SshConnection(SshConfig(host="ann@gate")) as connection:
        assert " -M -N -f " in (tmp_path / "log").read_text()
    assert "-O exit ann@gate" in (tmp_path / "log").read_text() and not connection.folder.exists()


def test_a_connection_that_cannot_be_made_leaves_no_files(ssh: Path, tmp_path: Path) -> None:
    ssh.write_text("#!/bin/sh\nexit 255\n")
    connection = SshConnection(SshConfig(host="ann@gate"))
    with pytest.raises(ClusterError, match="`ssh ann@gate` failed"), connection:
        pass
    assert not connection.folder.exists()


def test_what_ssh_says_when_it_connects_again_is_passed_on(ssh: Path) -> None:
    ssh.write_text("#!/bin/sh\necho 'No route to host' >&2; exit 255\n")
    lines: list[str] = []
    with pytest.raises(ClusterError, match="`ssh ann@gate` failed"):
        SshConnection(SshConfig(host="ann@gate")).open_again(lines.append)
    assert lines == ["No route to host"]


def test_the_socket_of_a_killed_connection_does_not_keep_the_next_one_from_its_own(ssh: Path) -> None:
    connection = SshConnection(SshConfig(host="ann@gate"))
    stale = connection.folder / "s"
    ssh.write_text(f"#!/bin/sh\n[ ! -e {stale} ]\n")
    stale.touch()
    connection.open_again(lambda line: None)
    assert not stale.exists()


def test_a_program_that_is_not_there_is_named(ssh: Path) -> None:
    with pytest.raises(ClusterError, match=r"This machine has no `no-such-program`\. Install it\."):
        run_program(["no-such-program", "x"], timeout_s=1, hint="Install it.")
