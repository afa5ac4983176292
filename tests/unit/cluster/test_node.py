"""A node's private folder and its token: what another user of the machine prepared is not used."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tandem.cluster import node
from tandem.cluster.health.cordons import Cordon, remove_cordon, write_cordon
from tandem.cluster.local import LOOPBACK
from tandem.cluster.marks import marked_processes
from tandem.cluster.ports import free_ports
from tandem.errors import ClusterError, ConfigError, UnsafePathError


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
    for arguments in (["--num-cpus=1"], ["--head", "--address", "10.0.0.1:6379"]):
        with pytest.raises(ConfigError, match=r"either --head to start a cluster, or --address HOST:PORT"):
            node.start(arguments)


def test_options_that_cannot_be_are_refused_before_anything_is_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    with pytest.raises(ConfigError, match="--port is '99999'; it must be a whole number from 1 to 65535"):
        node.start(["--head", "--port", "99999"])
    with pytest.raises(ConfigError, match="--address is 'head'; it must be HOST:PORT"):
        node.start(["--address=head"])
    with pytest.raises(ClusterError, match=r"no-such-host\.invalid cannot be resolved"):
        node.start(["--address", "no-such-host.invalid:6379"])
    assert not folder.exists()


def test_stopping_where_nothing_runs_does_nothing(folder: Path) -> None:
    assert node.stop() == 0


@pytest.mark.parametrize("name", ["TANDEM_HOME", "TANDEM_DATABASE_URL"])
def test_an_environment_that_is_not_filled_in_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "postgresql://<user>:<password>@<host>/tandem")
    with pytest.raises(ConfigError, match=rf"{name} still has a placeholder \(<\.\.\.>\)"):
        node.start(["--head"])


def test_a_port_that_another_node_has_is_named(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node, "HAPROXY_PORTS", [port])
            with pytest.raises(ClusterError, match=rf"Port {port} of this machine is taken"):
                node.start(["--head"])


def test_where_the_folder_cannot_be_used_another_one_can_be_named(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")
    with pytest.raises(UnsafePathError, match="TANDEM_RUNTIME_DIR"):
        node.runtime_folder()


def recorded_mark() -> str | None:
    recorded = node._recorded_node()
    return recorded.mark if recorded else None


FAKE_RAY = """
import os, subprocess, sys
if "fail" in sys.argv:
    print("no such head")
    sys.exit(1)
# A child that outlives this process, as a raylet does, and is called so.
raylet = os.path.join(os.path.dirname(__file__), "raylet")
if not os.path.exists(raylet):
    os.symlink(os.path.realpath(sys.executable), raylet)
subprocess.Popen([raylet, "-S", "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, start_new_session=True)
"""


@pytest.fixture
def fake_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray start` by a stand-in, on ports that are free."""
    (tmp_path / "ray" / "scripts").mkdir(parents=True)
    for place in ("ray/__init__.py", "ray/scripts/__init__.py"):
        (tmp_path / place).write_text("")
    (tmp_path / "ray" / "scripts" / "scripts.py").write_text(FAKE_RAY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(node, "HAPROXY_PORTS", free_ports(4))
    monkeypatch.setattr(node.haproxy, "write_script", lambda folder: folder / "haproxy-edited")


def processes_of(mark: str | None, count: int) -> bool:
    """Whether a node comes to have `count` processes: a new one is found once it has executed its program."""
    deadline = time.monotonic() + 10
    while len(marked_processes(str(mark))) != count and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(marked_processes(str(mark))) == count


def test_a_node_that_runs_is_not_ended_by_another_start_and_stop_leaves_nothing(folder: Path, fake_ray: None) -> None:
    node.start(["--head"])
    first = recorded_mark()
    assert first and processes_of(first, 1)
    with pytest.raises(ClusterError, match=r"A node of this user runs on this machine. `tandem node stop` ends it"):
        node.start(["--head", "fail"])
    assert recorded_mark() == first and processes_of(first, 1)
    assert node.stop() == 1
    assert not marked_processes(first) and not (folder / "tmp").exists() and node.stop() == 0


def test_a_start_that_fails_leaves_nothing_and_says_what_ray_said(folder: Path, fake_ray: None) -> None:
    with pytest.raises(ClusterError, match="ended with status 1. Ray said:\nno such head"):
        node.start(["--head", "fail"])
    assert recorded_mark() is None


def test_a_node_that_a_process_with_a_local_cluster_starts_lets_other_nodes_in(
    folder: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (only_this_machine,) = LOOPBACK.items()
    monkeypatch.setenv(*only_this_machine)
    node.start(["--head"])
    assert only_this_machine[0] not in os.environ
    assert processes_of(recorded_mark(), 1)
    (raylet,) = marked_processes(str(recorded_mark()))
    assert only_this_machine[0] not in raylet.environ()
    node.stop()


def test_the_watch_of_a_node_ends_what_its_raylet_left_and_not_the_next_node(
    folder: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "APPEAR_S", 0.1)
    node.start(["--head"])
    first = str(recorded_mark())
    assert processes_of(first, 1)
    for process in marked_processes(first):
        process.kill()
        process.wait(10)
    node.start(["--head"])
    second = str(recorded_mark())
    node._main(first)  # as the watcher of the first, which is late
    assert recorded_mark() == second and (folder / "tmp").exists() and processes_of(second, 1)
    node.stop()


def test_with_block_the_command_goes_on_until_the_node_has_ended(folder: Path, fake_ray: None) -> None:
    def end() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            mark = recorded_mark()
            for process in marked_processes(mark) if mark else ():
                if node._is_alive(process, "raylet"):
                    process.kill()
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=end)
    thread.start()
    node.start(["--head", "--block"])
    thread.join()
    assert recorded_mark() is None


def end_raylet(mark: str) -> None:
    assert processes_of(mark, 1)
    for process in marked_processes(mark):
        process.kill()


def wait_for_log(folder: Path, text: str, *, times: int = 1) -> None:
    log, deadline = folder / "node.log", time.monotonic() + 30
    while not log.exists() or log.read_text().count(text) < times:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no line was written"
        time.sleep(0.1)


def test_a_node_that_ended_by_itself_is_started_again_until_it_is_stopped(
    folder: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    node.start(["--head", "--restart"])
    marks = [recorded_mark()]
    for restarts in (1, 2):
        end_raylet(str(marks[-1]))
        # Until then `ray start` is one of the node's processes, too.
        wait_for_log(folder, "has been started again", times=restarts)
        marks.append(recorded_mark())
        assert processes_of(marks[-1], 1)
    assert len(set(marks)) == 3 and None not in marks
    assert (folder / "node.log").read_text().count("has been started again") == 2
    assert node.stop() == 1
    time.sleep(2.5)
    assert recorded_mark() is None and not any(marked_processes(str(mark)) for mark in marks)


def test_a_worker_waits_for_its_head_to_be_reached_before_it_starts_again(
    folder: Path, fake_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        node.start(["--address", f"127.0.0.1:{port}", "--restart"])
    first = str(recorded_mark())
    end_raylet(first)
    wait_for_log(folder, "cannot be reached")
    assert recorded_mark() == first and not marked_processes(first)
    with socket.create_server(("127.0.0.1", port)):
        wait_for_log(folder, "has been started again")
        assert processes_of(recorded_mark(), 1) and recorded_mark() != first
    node.stop()


def test_a_cordoned_node_stays_away_until_it_may_join_again(
    folder: Path, fake_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    node.start(["--head", "--restart"])
    first = str(recorded_mark())
    # As `tandem cluster cordon --drain` does, after which the raylet ends by itself.
    cordon = Cordon(node=socket.gethostname(), reason="a test", by="ann", at=datetime.now(UTC))
    write_cordon(cordon)
    end_raylet(first)
    wait_for_log(folder, "it is cordoned")
    assert recorded_mark() == first and not marked_processes(first)
    remove_cordon(cordon.node)
    wait_for_log(folder, "has been started again")
    assert processes_of(recorded_mark(), 1) and recorded_mark() != first
    node.stop()


def test_a_head_without_a_lasting_state_is_not_restarted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_REDIS_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="--restart on a head needs a cluster state that outlives it"):
        node.start(["--head", "--restart"])


def test_nodes_in_slots_have_ports_apart() -> None:
    ranges = []
    for slot in range(node.SLOTS):
        first, last = (int(each.partition("=")[2]) for each in node.slot_options(slot, head=False)[:2])
        ranges.append(range(first, last + 1))
    ports = [port for each in ranges for port in each]
    assert len(ports) == len(set(ports)) and set(ports) <= set(node.WORKER_PORTS)
    assert any(each.startswith("--dashboard-port=") for each in node.slot_options(0, head=True))


def test_a_folder_that_was_removed_is_not_made_again_by_the_nodes_watcher(folder: Path) -> None:
    (node.runtime_folder() / "ray").mkdir()
    assert node.stop(remove=True) == 0 and not folder.exists()
    node.supervise(node.RunningNode(mark="0" * 16, arguments=(), restart=False))
    assert not folder.exists()
