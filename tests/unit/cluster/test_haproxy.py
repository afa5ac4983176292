"""What is changed in HAProxy's configuration, on Ray's own template of it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from tandem.cluster.haproxy import serving_environment, write_script


@pytest.fixture
def edited(tmp_path: Path) -> str:
    """The template as HAProxy would read it, for an app that listens on every interface."""
    write_script(tmp_path)
    config = tmp_path / "haproxy.cfg"
    # As Ray fills it in for the host 0.0.0.0.
    config.write_text(HAPROXY_CONFIG_TEMPLATE.replace("{{ config.frontend_host }}", "*"))
    subprocess.run(["sed", "-i", "-f", str(tmp_path / "haproxy.sed"), str(config)], check=True)
    return config.read_text()


def test_the_admin_socket_is_for_its_owner_alone(edited: str) -> None:
    (line,) = re.findall(r"^ *stats socket .*", edited, re.MULTILINE)
    assert " mode 600 level admin" in line


def test_statistics_and_metrics_are_on_loopback_and_the_public_listener_is_where_it_was(edited: str) -> None:
    binds = re.findall(r"^ *bind (\S*?):\{\{ config\.(\w+)_port \}\}", edited, re.MULTILINE)
    assert {port: host for host, port in binds} == {
        "metrics": "127.0.0.1",
        "frontend": "*",
        "stats": "127.0.0.1",
    } | {port: host for host, port in binds if port == "grpc_frontend"}


def test_connections_of_an_address_and_the_time_of_a_request_are_limited(edited: str) -> None:
    assert re.findall(r"^ *timeout http-request (\d+)s$", edited, re.MULTILINE) == ["10"]
    listener = edited.split("frontend http_frontend")[1].split("http-request", 1)[0]
    assert "tcp-request connection reject if { sc0_conn_cur gt 2048 }" in listener
    # Of the public listener alone.
    assert edited.count("stick-table") == 1


def test_the_list_of_apps_is_not_told(edited: str) -> None:
    assert re.findall(r"^ *http-request return status (\S+) if routes$", edited, re.MULTILINE) == ["404"]


def test_the_script_is_for_its_owner_alone_and_sockets_have_short_paths(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    variables = serving_environment(folder, [1, 2, 3, 4], range(5, 6))
    assert stat.S_IMODE(Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"]).stat().st_mode) == 0o700
    files = [name for name in variables if name.endswith(("_LOC", "_SOCKET_PATH", "_STATE_BASE", "_STATE_FILE"))]
    assert len(files) == 5 and all(variables[name].startswith(str(folder)) for name in files)
    # In /tmp/tandem-XXXXXXXX, with the folder of a node's id that Ray adds, and the largest process id of Linux.
    admin = Path(variables["RAY_SERVE_HAPROXY_SOCKET_PATH"]).relative_to(folder)
    longest = Path("/tmp/tandem-XXXXXXXX") / admin.parent / ("n" * 56) / f"{admin.name}.{2**22}.tmp"
    assert len(str(longest)) <= 107


@pytest.mark.parametrize("gone", [False, True])
def test_a_child_of_a_cluster_takes_the_packages_haproxy(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    inherited = write_script(first)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(inherited))
    if gone:
        inherited.unlink()
    script = write_script(second).read_text()
    assert str(first) not in script
    assert os.access(script.rsplit('exec "')[-1].split('"')[0], os.X_OK)


def test_a_haproxy_of_the_users_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "haproxy"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o700)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(own))
    assert f'exec "{own}"' in write_script(tmp_path).read_text()
