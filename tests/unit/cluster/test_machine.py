"""Readings of the machine, on the real one and on files in its kernel's format."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from tandem.cluster import machine


def test_cpu_flags_are_those_of_the_first_core(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: x: y\nflags\t\t: fpu avx2 amx_tile\n\nflags\t\t: other\n")
    assert machine.cpu_flags(cpuinfo) == {"fpu", "avx2", "amx_tile"}
    assert machine.cpu_flags(tmp_path / "missing") == frozenset()


def test_a_containers_quota_lowers_the_cores(tmp_path):
    own = len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.usable_cores(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores(tmp_path) == own


def test_a_containers_limit_lowers_the_free_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert machine.free_memory(tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory(tmp_path) > 2**20


def test_a_busy_port_names_its_holder_and_a_free_one_nobody():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        holder = machine.port_holder(port)
        assert holder is not None
        assert (holder.pid, holder.name) == (os.getpid(), psutil.Process().name())
        assert f"(pid {os.getpid()})" in str(holder)
    assert machine.port_holder(port) is None


def test_a_busy_port_is_known_even_where_processes_are_hidden(monkeypatch):
    def hidden(kind):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", hidden)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert str(machine.port_holder(server.getsockname()[1])) == "a process of another user"


def test_this_environment_meets_tandems_requirements():
    assert machine.unmet_requirements() == []
    assert machine.unmet_requirements("dev") == []


def test_unmet_requirements_say_what_is_there_and_what_is_needed(monkeypatch):
    monkeypatch.setattr(
        machine.importlib.metadata,
        "requires",
        lambda name: ["no-such-dist>=1", "pytest>=9999", "other>1; extra == 'cpu'", "nope; python_version < '3'"],
    )
    missing, old = machine.unmet_requirements()
    assert missing == "no-such-dist (missing)"
    assert old == f"pytest {pytest.__version__} (needs >=9999)"
    assert machine.unmet_requirements("cpu") == ["other (missing)"]


def test_gpus_come_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == ["NVIDIA H100 80GB HBM3, 81559 MiB, driver 570.86.15"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []
    tool.unlink()
    assert machine.gpus() == []
