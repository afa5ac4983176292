"""A node's private folder and its token: what another user of the machine prepared is not used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tandem import node
from tandem.errors import ClusterError, UnsafePathError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "run"
    monkeypatch.setenv("TANDEM_RUNTIME_DIR", str(place))
    return place


def test_the_folder_is_made_for_its_user_alone(folder: Path) -> None:
    assert node.runtime_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert node.runtime_folder() == folder


def test_a_folder_that_others_may_write_to_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UnsafePathError, match="has mode 0777: other users can reach it"):
        node.runtime_folder()


def test_a_link_in_its_place_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="is not a folder"):
        node.runtime_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(UnsafePathError, match="belongs to nobody"):
        node.runtime_folder()


def test_a_node_without_the_clusters_token_does_not_join(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "auth_token"))
    with pytest.raises(ClusterError, match=r"auth_token is not here. Copy the head's token to it"):
        node.start(["--address", "127.0.0.1:1"])
    assert not (tmp_path / "auth_token").exists()


def test_a_node_that_is_told_of_no_head_is_refused(folder: Path) -> None:
    with pytest.raises(ClusterError, match=r"--head to start a cluster, or --address HOST:PORT"):
        node.start(["--num-cpus=1"])


def test_stopping_where_nothing_runs_does_nothing(folder: Path) -> None:
    assert node.stop() == 0
