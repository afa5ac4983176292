"""Several hosts on one machine: each a set of Linux namespaces with an address, a /tmp, a /root and an SSH server of its own.

They hang on a bridge that this machine reaches too. Needs root; what is missing is installed by scripts/install-test-servers.
Tests use them by tests/integration/hosts.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SUBNET = "10.77.0"
SSHD = "/usr/sbin/sshd"
START_S = 20.0

# Runs in a host's namespaces, as its first process. Everything under `binds` is the same folder on every host.
INIT = """\
set -e
hostname {name}
mount --make-rprivate /
mkdir -p {folder}/up {folder}/work {folder}/tmp
for shared in {binds}; do
  case "$shared" in /tmp/*) mkdir -p "{folder}/tmp${{shared#/tmp}}"; mount --bind "$shared" "{folder}/tmp${{shared#/tmp}}";; esac
done
# A login of its own: its ~/.ray, ~/.bashrc and ~/.tandem are not this machine's.
mount -t overlay overlay -o lowerdir=/root,upperdir={folder}/up,workdir={folder}/work /root
rm -rf /root/.ray /root/.tandem
printf '' > /root/.bashrc
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount --bind {hosts_file} /etc/hosts
mount --bind {empty} /etc/resolv.conf
mkdir -p /run/sshd
chmod 1777 {folder}/tmp

mount --rbind {folder}/tmp /tmp
exec {sshd} -D -e -f {sshd_config}
"""
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/client_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
AcceptEnv *
"""


class UnavailableError(RuntimeError):
    """This machine cannot have such hosts or servers; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One host; `run` executes a command in a login shell there, over SSH."""

    name: str
    address: str
    namespace: str
    key: Path

    def run(self, command: str, *, timeout_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command; AssertionError with its output if it fails and `check` is set."""
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        flags = [flag for option in options for flag in ("-o", option)]
        result = subprocess.run(
            [
                "ssh",
                *flags,
                "-i",
                str(self.key),
                f"root@{self.address}",
                f"bash --login -c {_quoted(f'. ~/.bashrc; {command}')}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or result.returncode == 0, f"{self.name}: {command}\n{result.stdout[-6000:]}"
        return result

    def listeners(self) -> list[tuple[str, int]]:
        """Address and port of every TCP socket that listens on this host."""
        shown = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Htln"], capture_output=True, text=True, check=True
        ).stdout
        ends = [line.split()[3].rpartition(":") for line in shown.splitlines()]
        return [(address.strip("[]"), int(port)) for address, _, port in ends]


@contextlib.contextmanager
def hosts(count: int, folder: Path, shared: Sequence[Path]) -> Iterator[list[Host]]:
    """`count` hosts for the length of a block; `shared` folders, and this repository, are the same on all of them."""
    require_namespaces()
    _remove_leftovers()
    mark = f"{os.getpid() % 10000}"
    bridge = f"br{mark}"
    names = [f"t{mark}n{number}" for number in range(1, count + 1)]
    addresses = [f"{SUBNET}.{10 + number}" for number in range(1, count + 1)]
    key, hosts_file, empty = folder / "client_key", folder / "hosts", folder / "empty"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (key, folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    # Without a name service each look-up of an unknown name takes 10 s.
    known = "".join(f"{address} {name}\n" for address, name in zip(addresses, names, strict=True))
    hosts_file.write_text("127.0.0.1 localhost\n" + known)
    empty.write_text("")
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    started: list[subprocess.Popen[bytes]] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{SUBNET}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for name, address in zip(names, addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"v{name}", "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "route", "add", "default", "via", f"{SUBNET}.1")
            own = folder / name
            own.mkdir()
            binds = " ".join(str(path.resolve()) for path in (REPOSITORY, folder, *shared))
            script = INIT.format(
                name=name, folder=own, binds=binds, hosts_file=hosts_file, empty=empty,
                sshd=SSHD, sshd_config=folder / "sshd_config",
            )  # fmt: skip
            with (own / "log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--mount",
                         "--kill-child", "bash", "-c", script],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
        found = [
            Host(name=name, address=address, namespace=name, key=key)
            for name, address in zip(names, addresses, strict=True)
        ]
        for host in found:
            _wait(host, folder / host.name / "log")
        yield found
    finally:
        for name in names:
            _remove(name)
        for process in started:
            process.wait(10)
        subprocess.run(["ip", "link", "del", bridge], check=False, stderr=subprocess.DEVNULL)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for something on the hosts; AssertionError that says `what` did not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.25)


def require_namespaces() -> None:
    """Install what hosts need; UnavailableError where this user or machine cannot make namespaces."""
    if os.geteuid() != 0:
        raise UnavailableError("network namespaces need root")
    if any(
        shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None for tool in ("sshd", "ip", "rsync")
    ):
        subprocess.run([str(REPOSITORY / "scripts" / "install-test-servers"), "hosts"], check=True, timeout=300)
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        raise UnavailableError(f"this machine gives no namespaces: {probe.stderr.strip()}")


def _remove_leftovers() -> None:
    """Remove the hosts of a test process that was killed: two bridges with the same addresses would answer for each other."""
    shown = subprocess.run(
        ["ip", "-o", "addr", "show", "to", f"{SUBNET}.1"], capture_output=True, text=True, check=True
    ).stdout
    for bridge in re.findall(r"^\d+: (br\d+) ", shown, re.MULTILINE):
        namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        for name in re.findall(rf"^(t{bridge[2:]}n\d+)\b", namespaces, re.MULTILINE):
            _remove(name)
        subprocess.run(["ip", "link", "del", bridge], check=False, stderr=subprocess.DEVNULL)


def _remove(name: str) -> None:
    """End a host's processes, and remove its namespace and its link."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in pids.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "link", "del", f"v{name}"], check=False, stderr=subprocess.DEVNULL)


def _wait(host: Host, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while host.run("true", check=False, timeout_s=10).returncode:
        assert time.monotonic() < deadline, f"{host.name} did not come up:\n{log.read_text()}"
        time.sleep(0.2)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"
