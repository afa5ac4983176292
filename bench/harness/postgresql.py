"""A PostgreSQL server with data of its own; scripts/install-test-servers brings Debian's binaries if need be.

Tests use it by tests/integration/postgresql.py.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from bench.harness.hosts import REPOSITORY, UnavailableError
from tandem.cluster.ports import free_ports

USER = "tandem"
START_S = 30.0


@dataclass(kw_only=True)
class Server:
    """A running server; `stop` and `start` take it away and bring it back with its data."""

    host: str
    port: int
    password: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        """The URL of a database on it, as users write it."""
        return f"postgresql://{USER}:{self.password}@{self.host}:{self.port}/{database}"

    def create(self, database: str, *, template: str = "template1") -> str:
        """Make a database, a copy of `template`, which is empty unless it is one of ours; returns its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def start(self) -> None:
        """Start it and wait until it answers."""
        log = (self.folder / "log").open("ab")
        options = [
            f"listen_addresses={self.host}",
            f"port={self.port}",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
        ]
        flags = [flag for option in options for flag in ("-c", option)]
        command = [str(_binaries() / "postgres"), "-D", str(self.folder / "data"), *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, **_unprivileged()
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        """End it at once, connections included."""
        if self.process is not None:
            self.process.send_signal(2)  # SIGINT is PostgreSQL's fast shutdown
            self.process.wait(30)
            self.process = None


@contextlib.contextmanager
def postgresql(host: str = "127.0.0.1") -> Iterator[Server]:
    """A server on `host` for the length of a block, with a superuser `tandem` and a password."""
    if not (_binaries() / "postgres").exists():
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise UnavailableError("PostgreSQL is not installed: scripts/install-test-servers postgresql, as root")
        subprocess.run([str(REPOSITORY / "scripts" / "install-test-servers"), "postgresql"], check=True, timeout=300)
    # In /tmp itself: the server runs as another user, whom pytest's folders are closed to.
    folder = Path(tempfile.mkdtemp(prefix="tandem-pg-"))
    server = Server(host=host, port=free_ports(1)[0], password=secrets.token_hex(8), folder=folder)
    try:
        (folder / "password").write_text(server.password)
        if os.geteuid() == 0:
            for path in (folder, folder / "password"):
                shutil.chown(path, _account())
        initdb = [str(_binaries() / "initdb"), "-D", str(folder / "data"), "-U", USER, "-A", "scram-sha-256"]
        more = ["--pwfile", str(folder / "password"), "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        # A language's order of names, as databases usually have it: not that of code points.
        more += ["--locale-provider=icu", "--icu-locale=en-US"]
        subprocess.run([*initdb, *more], check=True, stdout=subprocess.DEVNULL, cwd=folder, **_unprivileged())
        with (folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet scram-sha-256\n")
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    which = shutil.which("postgres")
    return found[-1].parent if found else Path(which).resolve().parent if which else Path("/usr/bin")


def _account() -> str:
    """Whom the server runs as where the tests run as root: PostgreSQL refuses to be root."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


def _unprivileged() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(_account())
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
