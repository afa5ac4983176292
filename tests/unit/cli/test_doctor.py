"""What the doctor finds, and that it says what to do."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket

import pytest
from certificates import make_pair
from rich.console import Console

from tandem.cli import doctor as module
from tandem.cli.doctor import doctor, run_doctor
from tandem.cluster import machine
from tandem.registry import Registry


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home and a gateway port of the test's own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TANDEM_PORT", str(port))
    for name in ("RAY_ADDRESS", "TANDEM_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def finding(name, state=None):
    """The finding of that name."""
    return next(f for f in doctor() if f.name == name and state in (None, f.state))


def printed(**kwargs):
    """The exit status and the text that a person sees."""
    text = io.StringIO()
    status = run_doctor(Console(file=text, width=200), **kwargs)
    return status, text.getvalue()


@pytest.fixture
def room(monkeypatch):
    """Memory and disk enough, whatever else runs on this machine."""
    monkeypatch.setattr(machine, "free_memory", lambda: 64 * 2**30)
    monkeypatch.setattr(module, "free_bytes", lambda path: 64 * 2**30)


def test_this_machine_has_no_problem_and_every_check_reports(room):
    findings = doctor()
    assert [f for f in findings if f.state == "problem"] == []
    names = {f.name for f in findings}
    assert {"Python", "Packages", "CPU", "Memory", "Shared memory", "Disk", "GPU", "HAProxy", "Registry"} <= names
    assert {"Port 8265", "Port 6379", "Ray cluster"} <= names


def test_the_status_is_0_without_problems(room):
    status, text = printed()
    assert status == 0
    assert "All right." in text


def test_a_busy_gateway_port_is_a_problem_that_names_its_holder(monkeypatch, room):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("TANDEM_PORT", str(port))
        found = finding(f"Port {port}")
        status, text = printed()
    assert found.state == "problem"
    assert f"pid {os.getpid()}" in found.says
    assert f"TANDEM_PORT={port + 1}" in found.fix
    assert status == 1
    assert "1 problem;" in text
    assert f"→ Stop it (`kill {os.getpid()}`)" in text


def test_a_busy_ray_port_is_worth_a_note_only(monkeypatch, room):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(module, "RAY_PORTS", {port: "Ray's dashboard"})
        assert finding(f"Port {port}").state == "note"
        assert printed()[0] == 0


def test_a_cuda_torchvision_beside_a_cpu_torch_is_a_problem_with_the_command_that_helps(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    monkeypatch.setattr(machine, "installed", versions.get)
    found = next(f for f in doctor() if "torchvision" in f.says)
    assert found.state == "problem"
    assert found.fix.startswith("Run `") and "pip uninstall -y torchvision`" in found.fix


def test_a_missing_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "unmet_requirements", lambda extra=None: ["peft (missing)"] if extra == "cpu" else [])
    found = finding("Packages")
    assert (found.state, found.says) == ("problem", "peft (missing)")
    assert "make setup" in found.fix


@pytest.mark.parametrize(
    ("flags", "state", "says"),
    [
        ({"avx2", "avx512f", "amx_tile"}, "note", "SIGILL"),
        ({"avx2"}, "ok", "AVX2"),
        ({"sse2"}, "problem", "needs AVX2"),
    ],
)
def test_the_cpus_features_decide_what_is_said(monkeypatch, flags, state, says):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(machine, "usable_cores", lambda: 2.0)
    monkeypatch.setattr(module, "architecture", lambda: "x86_64")
    found = finding("CPU")
    assert found.state == state
    assert says in found.says
    assert state != "note" or "float32" in found.fix


@pytest.mark.parametrize(("free", "state"), [(2**30, "problem"), (4 * 2**30, "note"), (64 * 2**30, "ok")])
def test_free_memory_is_held_against_what_is_needed(monkeypatch, free, state):
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    assert finding("Memory").state == state


@pytest.mark.parametrize(("free", "state"), [(2**20, "problem"), (2**30, "note"), (2**40, "ok")])
def test_free_disk_is_held_against_what_is_needed(monkeypatch, free, state):
    monkeypatch.setattr(module, "free_bytes", lambda path: free)
    found = finding("Disk")
    assert found.state == state
    assert state == "ok" or "TANDEM_HOME" in found.fix


def test_a_gpu_that_torch_cannot_use_is_a_note(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: ["NVIDIA H100, 81559 MiB, driver 570.1"])
    monkeypatch.setattr(machine, "installed", lambda name: "2.13.0+cpu")
    found = finding("GPU")
    assert found.state == "note"
    assert "tandem[gpu]" in found.fix


def test_a_registry_that_does_not_open_is_a_problem(home):
    home.mkdir()
    (home / "tandem.db").write_text("no database " * 200)
    found = finding("Registry")
    assert found.state == "problem"
    assert "not a database" in found.says


def test_a_model_whose_files_are_gone_is_a_note(home, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    Registry.open().register_model("base", folder)
    assert finding("Registry").says == "opens; models: 1, adapters: 0"
    shutil.rmtree(folder)
    found = finding("Registry")
    assert found.state == "note"
    assert "tandem models rm base@1" in found.fix


@pytest.mark.parametrize(("days", "state"), [(-1, "problem"), (3, "note"), (30, "ok")])
def test_a_certificate_of_the_listener_is_looked_at_before_it_expires(tmp_path, monkeypatch, days, state):
    assert list(module._tls()) == []
    pair = make_pair(tmp_path, "first", days=days)
    monkeypatch.setenv("TANDEM_TLS_CERTIFICATE", pair.certificate)
    monkeypatch.setenv("TANDEM_TLS_KEY", pair.key)
    (found,) = module._tls()
    assert found.state == state and pair.certificate in found.says


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1", "nonsense"])
def test_a_ray_address_where_nobody_answers_is_a_problem_at_once(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    found = finding("Ray cluster")
    assert found.state == "problem"
    assert address in found.says
    assert "unset RAY_ADDRESS" in found.fix


def test_a_haproxy_that_does_not_run_is_a_problem(tmp_path, monkeypatch):
    broken = tmp_path / "haproxy"
    broken.write_text("#!/bin/sh\necho 'no libcrypt' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(broken))
    found = finding("HAProxy")
    assert found.state == "problem"
    assert "no libcrypt" in found.says


def test_a_check_that_fails_itself_is_a_problem_and_the_rest_still_reports(monkeypatch):
    def crash():
        raise ZeroDivisionError

    monkeypatch.setattr(machine, "gpus", crash)
    found = finding("gpu")
    assert found.state == "problem"
    assert "ZeroDivisionError" in found.says
    assert finding("Registry").state == "ok"


def test_json_holds_every_finding(room):
    status, text = printed(as_json=True)
    assert status == 0
    assert {entry["name"] for entry in json.loads(text)} == {f.name for f in doctor()}
