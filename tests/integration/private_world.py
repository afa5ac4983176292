"""For test_private_files.py: an app that is served from empty /tmp and /dev/shm, and attacked by another user.

python private_world.py MODEL    (as root; MODEL is `echo`, or a folder for vLLM)

Prints one line of JSON: what the other user could do, who listens where, and which files remain after `serve down`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from tandem.cluster.marks import MARK, marked_processes
from tandem.cluster.ports import free_ports
from tandem.settings import child_environment

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x00020000, 0x1000, 0x4000, 1 << 18
KEPT = [path for path in (Path(__file__).resolve().parents[2],) if path.is_relative_to("/tmp")]
"""Folders below /tmp that the test itself needs; an environment lies in its repository."""
HOME = Path("/tmp/home")
NOBODY = pwd.getpwnam("nobody")
ECHO = "models: [{model: echo, name: echo, engine: echo}]\n"
ATTACK_S = 120
SOCKETS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.RayletDriver/ClusterInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.ReporterService/ReportOCMetrics",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.serve.ASGIService/HandleRequest",
)
"""One method of each service that Ray's processes have."""
REQUESTS = (
    ("POST", "/api/jobs/"),
    ("POST", "/api/job_agent/jobs/"),
    ("POST", "/get_or_create_runtime_env"),
    ("PUT", "/api/serve/applications/"),
)
"""Requests that would run what they are told."""


def fresh_folders() -> None:
    """Give this process and its children empty /tmp and /dev/shm of their own."""
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    checked(libc.unshare(CLONE_NEWNS))
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    # This repository and its environment stay where they are, also where that is below /tmp.
    kept = {path: os.open(path, os.O_PATH) for path in KEPT}
    for folder in (b"/tmp", b"/dev/shm"):
        checked(libc.mount(b"tmpfs", folder, b"tmpfs", 0, b"mode=1777"))
    for path, descriptor in kept.items():
        path.mkdir(parents=True)
        checked(libc.mount(f"/proc/self/fd/{descriptor}".encode(), bytes(path), None, MS_BIND, None))
        os.close(descriptor)
    # The way to it was by another mount.
    os.chdir(Path(__file__).parents[2])


def tandem(*arguments: str) -> str:
    """Run `tandem ARGUMENTS` in a home that it has to create."""
    environment = {"HOME": str(HOME), "TANDEM_HOME": None, "RAY_ADDRESS": None, "RAY_AUTH_TOKEN_PATH": None}
    done = subprocess.run(
        [sys.executable, "-m", "tandem", *arguments],
        # PyTorch writes its folder into the environment of whoever started this.
        env=child_environment({**environment, "RAY_AUTH_TOKEN": None, "TMPDIR": None, "TORCHINDUCTOR_CACHE_DIR": None}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def files_of(cluster: list[psutil.Process]) -> list[str]:
    """Every file below /tmp and /dev/shm, and what the cluster's processes have open or execute elsewhere."""
    found = {"/tmp", "/dev/shm"}
    for top in ("/tmp", "/dev/shm"):
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if Path(folder, name) not in KEPT]
            found |= {f"{folder}/{name}" for name in (*folders, *files)}
    for process in cluster:
        with contextlib.suppress(OSError):
            links = [f"/proc/{process.pid}/exe", *(f.path for f in os.scandir(f"/proc/{process.pid}/fd"))]
            found |= {os.readlink(link) for link in links}
    return sorted(path for path in found if path.startswith("/") and not path.startswith(("/proc", "/sys")))


def unix_sockets(cluster: list[psutil.Process]) -> list[str]:
    """Addresses of the cluster's Unix sockets; an abstract one starts with @."""
    inodes = set()
    for process in cluster:
        with contextlib.suppress(OSError):
            links = [os.readlink(f.path) for f in os.scandir(f"/proc/{process.pid}/fd")]
            inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sorted({line[7] for line in lines if len(line) > 7 and line[6] in inodes})


def as_nobody(work: Callable[[], Any]) -> Any:
    """What `work` returns in a process of the user nobody."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        status = 1
        signal.alarm(ATTACK_S)
        try:
            os.setgroups([])
            os.setgid(NOBODY.pw_gid)
            os.setuid(NOBODY.pw_uid)
            with open(writer, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0, "the attack itself failed"
    return json.loads(text)


def attack(paths: Iterable[str], sockets: Iterable[str]) -> list[str]:
    """What this user can do with other users' files, each as `action path`."""
    done = []
    for path in paths:
        for name, action in ACTIONS.items():
            with contextlib.suppress(OSError):
                action(path)
                done.append(f"{name} {path}")
    for address in {*sockets, *(path for path in paths if ".sock" in path)}:
        for kind in SOCKETS:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as client:
                client.settimeout(3)
                client.connect("\0" + address[1:] if address.startswith("@") else address)
                done.append(f"connect {address}")
    return done


def _create(path: str) -> None:
    probe = f"{path}/nobody-was-here"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
    os.unlink(probe)


def _write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))


def _read(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def _replace(path: str) -> None:
    os.rename(path, f"{path}.nobody")
    os.rename(f"{path}.nobody", path)


ACTIONS: dict[str, Callable[[str], None]] = {"create": _create, "write": _write, "read": _read, "replace": _replace}


def ask_ports(ports: Iterable[int]) -> dict[str, list[Any]]:
    """Ask each port for what Ray's services and HTTP servers do, without a token: the gRPC codes and HTTP statuses."""
    with ThreadPoolExecutor(16) as threads:
        return dict(threads.map(_ask_port, ports))


def _ask_port(port: int) -> tuple[str, list[Any]]:
    said: list[Any] = []
    for method in METHODS:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                channel.unary_unary(method)(b"", timeout=5)
                said.append(f"OK {method}")
            except grpc.RpcError as error:
                said.append(error.code().name)  # type: ignore[attr-defined]
        if said[-1] == "DEADLINE_EXCEEDED":  # it speaks neither gRPC nor HTTP, such as the ports of torch.distributed
            return str(port), said
    for method, path in REQUESTS:
        try:
            said.append(httpx.request(method, f"http://127.0.0.1:{port}{path}", timeout=10, json={}).status_code)
        except httpx.HTTPError:
            break
    return str(port), said


def main(model: str) -> None:
    """Serve, attack, stop, and print the findings."""
    fresh_folders()
    HOME.mkdir()
    HOME.chmod(0o755)
    port = free_ports(1)[0]
    if model == "echo":
        config = HOME / "echo.yaml"
        config.write_text(ECHO)
        arguments = ["--config", str(config)]
    else:
        arguments = [model]
    before = set(files_of([]))
    tandem("serve", "up", *arguments, "--port", str(port), "--detach")
    try:
        record = json.loads(next((HOME / ".tandem").glob("cluster-*.json")).read_text())
        name = "echo" if model == "echo" else Path(model).name
        question = {"model": name, "max_tokens": 4, "prompt": "the cat"}
        status = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=question, timeout=120).status_code
        cluster = marked_processes(record["environment"][MARK])
        paths = [path for path in files_of(cluster) if path not in before]
        sockets = unix_sockets(cluster)
        listening = []
        for process in cluster:
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        what = " ".join(process.cmdline())[:120]
                        listening.append((connection.laddr.ip, connection.laddr.port, what))
        admin = [oct(os.stat(path).st_mode & 0o777) for path in paths if path.endswith("/admin.sock")]
        done = as_nobody(lambda: attack(paths, sockets))
        answers = as_nobody(lambda: ask_ports(sorted({number for _, number, _ in listening} - {port})))
    finally:
        tandem("serve", "down")
    after = [path for path in files_of([]) if path not in before and not path.startswith(f"{HOME}/.")]
    print(
        json.dumps(
            {
                "status": status, "paths": paths, "sockets": sockets, "done": done, "listening": listening,
                "answers": answers, "after": after, "admin": admin, "home": oct(os.stat(HOME / ".tandem").st_mode & 0o777),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
