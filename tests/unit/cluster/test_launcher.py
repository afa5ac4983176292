"""Cluster files before they are given to Ray's launcher."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cluster import launcher as launcher_module
from tandem.cluster.launcher import ClusterFile, Launcher, active_nodes
from tandem.errors import ClusterError, ConfigError

STATUS = """\
======== Autoscaler status: 2026-11-30 10:00:00.0 ========
Node status
---------------------------------------------------------------
Active:
 1 head
 2 local.cluster.node
Pending:
 (no pending nodes)
Recent failures:
 (no failures)
"""
FILE = """\
cluster_name: test
provider: {type: local, head_ip: HEAD, worker_ips: [10.0.0.2]}
auth: {ssh_user: ann, ssh_private_key: /keys/id}
min_workers: 1
file_mounts: {~/.tandem.env: ENV, ~/.ray/auth_token: TOKEN}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    environment, token = tmp_path / "tandem.env", tmp_path / "auth_token"
    environment.write_text("# <a comment>\nTANDEM_HOME=/shared\n")
    token.write_text("x")
    token.chmod(0o600)
    text = FILE.replace("ENV", str(environment)).replace("TOKEN", str(token)).replace("HEAD", "10.0.0.1")
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that Ray's launcher needs; nothing here runs them."""
    monkeypatch.setattr(launcher_module.shutil, "which", lambda program: f"/usr/bin/{program}")


def test_a_file_that_is_filled_in_passes(file: Path) -> None:
    found = ClusterFile.read(file)
    found.check()
    assert found.is_local and found.workers == 1
    login = found.login("10.0.0.1")
    assert (login.host, login.options()) == (
        "ann@10.0.0.1",
        [
            "-i",
            "/keys/id",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ],
    )


def test_what_is_not_filled_in_is_named_with_its_line(file: Path) -> None:
    file.write_text(file.read_text().replace("10.0.0.1", "<head>"))
    with pytest.raises(ConfigError, match=r"line 2 still has the placeholder <head>"):
        ClusterFile.read(file).check()


def test_files_for_the_nodes_are_looked_at_first(file: Path) -> None:
    environment, token = file.parent / "tandem.env", file.parent / "auth_token"
    environment.write_text("TANDEM_DATABASE_URL='postgresql://<user>@db'\n")
    with pytest.raises(ConfigError, match=r"tandem.env still has the placeholder <user>"):
        ClusterFile.read(file).check()
    environment.write_text("")
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ClusterFile.read(file).check()
    token.unlink()
    with pytest.raises(ConfigError, match="ray get-auth-token --generate"):
        ClusterFile.read(file).check()


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "not YAML"), ("a: 1", "no cluster file"), (None, "There is no file")]
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        ClusterFile.read(path)


def test_nodes_of_the_start_are_those_of_the_types_but_the_head(file: Path) -> None:
    repository = Path(__file__).parents[3]
    assert ClusterFile.read(repository / "cluster.yaml").workers == 0
    assert not ClusterFile.read(repository / "cluster.yaml").is_local


def test_active_nodes_are_counted() -> None:
    assert active_nodes(STATUS) == 3 and active_nodes("") == 0
    assert active_nodes(STATUS.replace("\n", "\r\n")) == 3


def test_a_launcher_that_hangs_is_told_with_its_seconds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "COMMAND_TIMEOUT_S", 0.05)
    launcher = Launcher(ClusterFile.read(file))
    with pytest.raises(ClusterError, match=r"get-head-ip .*did not end within 0\.05 s\. Check that the head"):
        launcher.head()
    # While nodes are waited for, a head that does not answer has none yet.
    assert launcher.nodes() == 0
