"""What another user could have written is neither followed nor executed."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tandem.cluster import local as cluster
from tandem.errors import UnsafePathError
from tandem.private import (
    check_home,
    check_private_folder,
    ensure_private_folder,
    make_private_folder,
    make_shared_folder,
    read_private_file,
    replaceable_parent,
)
from tandem.storage import write_atomic

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def record(tandem_home: Path, tmp_path: Path) -> Path:
    """The record of a cluster that has ended."""
    content = {
        "pid": 2**22 + 1,
        "kept": True,
        "dashboard_url": "http://127.0.0.1:9",
        "address": "127.0.0.1:9",
        "folder": str(tmp_path / "cluster"),
        "environment": {cluster.MARK: "m", "RAY_SERVE_HAPROXY_BINARY_PATH": "/tmp/x"},
    }
    path = cluster.record_path()
    write_atomic(path, json.dumps(content), mode=0o600)
    return path


def test_folders_are_created_for_their_owner_alone(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "b")
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "a" / "b") == 0o700
    check_private_folder(tmp_path / "a" / "b")


def test_an_existing_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    make_private_folder(tmp_path / "new")
    assert mode_of(tmp_path) == 0o750


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o710, 0o701])
def test_a_folder_that_others_can_reach_is_not_private(tmp_path: Path, mode: int) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f").chmod(mode)
    with pytest.raises(UnsafePathError, match=f"mode {mode:04o}.*chmod 0700"):
        check_private_folder(tmp_path / "f")


def test_a_symbolic_link_is_not_a_private_folder(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        check_private_folder(tmp_path / "link")


def test_a_folder_below_one_where_anybody_can_rename_it_is_not_private(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "open" / "f")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafePathError, match="every user can rename"):
        check_private_folder(tmp_path / "open" / "f")
    (tmp_path / "open").chmod(0o1777)
    check_private_folder(tmp_path / "open" / "f")


@as_root
def test_a_folder_of_another_user_is_not_private(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "f")
    os.chown(tmp_path / "f", NOBODY, -1)
    with pytest.raises(UnsafePathError, match="belongs to"):
        check_private_folder(tmp_path / "f")


def test_a_home_is_created_for_its_owner_alone(tmp_path: Path) -> None:
    assert check_home(tmp_path / "home") is None
    assert mode_of(tmp_path / "home") == 0o700


def test_a_home_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    with pytest.raises(UnsafePathError, match="mode 0777.*chmod o-w"):
        check_home(tmp_path / "home")


def test_a_home_that_a_group_can_write_is_warned_of_unless_it_is_shared_on_purpose(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o770)
    assert "chmod g-w" in str(check_home(home))
    home.chmod(0o2770)
    assert check_home(home) is None
    home.chmod(0o755)
    assert check_home(home) is None


def test_a_home_that_cannot_be_created_is_left_to_the_command_that_needs_it() -> None:
    assert check_home(Path("/proc/none/home")) is None


@as_root
def test_a_home_of_another_user_is_warned_of_unless_a_group_shares_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    os.chown(home, NOBODY, os.getegid())
    assert "belongs to" in str(check_home(home))
    home.chmod(0o2770)
    assert check_home(home) is None
    os.chown(home, NOBODY, NOBODY)
    home.chmod(0o2770)
    assert "belongs to" in str(check_home(home))


def test_folders_below_a_shared_home_can_be_written_by_its_group(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    make_shared_folder(home / "cache" / "a", home)
    assert not mode_of(home / "cache" / "a") & stat.S_IWGRP
    home.chmod(0o2770)
    make_shared_folder(home / "cache" / "hub" / "b", home)
    assert mode_of(home / "cache" / "hub") == mode_of(home / "cache" / "hub" / "b") == 0o2770
    assert not mode_of(home / "cache") & stat.S_IWGRP


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users can enter, unlike pytest's `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_path_can_be_replaced_where_a_group_can_write_a_parent_that_it_can_reach(reachable: Path) -> None:
    parent = reachable / "team" / "cache"
    parent.mkdir(parents=True)
    path = parent / "compiled"
    assert replaceable_parent(path) is None
    parent.chmod(0o770)
    assert replaceable_parent(path) == parent
    parent.chmod(0o1770)
    assert replaceable_parent(path) is None
    parent.chmod(0o770)
    parent.parent.chmod(0o700)
    assert replaceable_parent(path) is None


def test_a_record_of_this_user_is_read(record: Path) -> None:
    found = cluster.recorded_cluster()
    assert found is not None and found.mark == "m"


@pytest.mark.parametrize("mode", [0o666, 0o660])
def test_a_record_that_others_can_change_is_refused(record: Path, mode: int) -> None:
    record.chmod(mode)
    for look in (cluster.recorded_cluster, cluster.running_cluster, cluster.connect):
        with pytest.raises(UnsafePathError, match=f"mode {mode:04o}"):
            look()


@as_root
def test_a_record_of_another_user_is_refused(record: Path) -> None:
    os.chown(record, NOBODY, -1)
    with pytest.raises(UnsafePathError, match="belongs to"):
        cluster.running_cluster()


@as_root
def test_a_cluster_of_another_user_in_a_shared_home_is_not_this_users(record: Path) -> None:
    content = record.read_text()
    record.unlink()
    for name in ("cluster.json", f"cluster-{NOBODY}.json"):
        theirs = record.with_name(name)
        write_atomic(theirs, content, mode=0o600)
        os.chown(theirs, NOBODY, -1)
    assert cluster.recorded_cluster() is None and cluster.connect() is None


def test_a_record_under_the_earlier_name_is_read_until_there_is_a_new_one(record: Path) -> None:
    earlier = record.with_name("cluster.json")
    write_atomic(earlier, record.read_text().replace('"m"', '"earlier"'), mode=0o600)
    found = cluster.recorded_cluster()
    assert found is not None and found.mark == "m"
    record.unlink()
    found = cluster.recorded_cluster()
    assert found is not None and found.mark == "earlier"
    found.stop()
    assert not earlier.exists()


def test_a_record_that_is_a_link_or_a_pipe_is_refused(record: Path) -> None:
    record.rename(record.with_name("elsewhere"))
    record.symlink_to(record.with_name("elsewhere"))
    with pytest.raises(UnsafePathError):
        cluster.recorded_cluster()
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(UnsafePathError, match="regular"):
        cluster.recorded_cluster()


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_private_file(tmp_path / "none")


def test_the_token_is_not_sent_to_the_port_of_a_cluster_that_has_ended(record: Path, tmp_path: Path) -> None:
    heard: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        content = json.loads(record.read_text())
        content["dashboard_url"] = f"http://127.0.0.1:{server.server_port}"
        write_atomic(record, json.dumps(content), mode=0o600)
        assert cluster.running_cluster() is None
        server.shutdown()
    assert heard == []


def test_an_atomic_write_has_its_mode_from_the_start(tmp_path: Path) -> None:
    write_atomic(tmp_path / "secret", "x", mode=0o600)
    assert mode_of(tmp_path / "secret") == 0o600


@pytest.mark.parametrize(("host", "alone"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_a_server_on_loopback_alone_is_told_from_one_on_all_interfaces(host: str, alone: bool) -> None:
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                pytest.skip("this machine has no network interface but loopback")
        assert cluster.only_on_loopback(f"127.0.0.1:{port}") is alone
    for other in (f"127.0.0.1:{port}", "10.0.0.1:6379", "ray://127.0.0.1:10001", "auto", "127.0.0.1"):
        assert not cluster.only_on_loopback(other)


def test_a_private_folder_is_made_or_refused(tmp_path: Path) -> None:
    folder = ensure_private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and ensure_private_folder(folder) == folder
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UnsafePathError, match="symbolic link"):
        ensure_private_folder(tmp_path / "link")
    if os.getuid() == 0:
        os.chown(folder, 65534, 65534)
        with pytest.raises(UnsafePathError, match="belongs to .* and this process runs as"):
            ensure_private_folder(folder)
