"""`make setup` takes the supported versions of Python and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = "#!/bin/sh\nexit 127\n"
"""As pyenv's python3.12 where that version is not selected."""


def fake(folder: Path, name: str, version: tuple[int, int]) -> Path:
    """A Python that says that it is of another version."""
    program = folder / name
    told = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{told}" "$2"\n')
    program.chmod(0o755)
    return program


def make(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON", "VENV"))}
    if path:
        env["PATH"] = f"{path}:{env['PATH']}"
    return subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def found(path: Path) -> Path:
    done = make("--silent", "--eval", "found: ; @echo $(PYTHON)", "found", path=path)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_python_3_11_is_taken_before_newer_ones(tmp_path: Path) -> None:
    for minor in (13, 12, 11):
        fake(tmp_path, f"python3.{minor}", (3, minor))
    assert found(tmp_path) == tmp_path / "python3.11"


def test_a_newer_python_is_taken_where_no_3_11_runs(tmp_path: Path) -> None:
    (tmp_path / "python3.11").write_text(BROKEN)
    (tmp_path / "python3.11").chmod(0o755)
    fake(tmp_path, "python3.12", (3, 12))
    assert found(tmp_path) == tmp_path / "python3.12"


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_setup_refuses_other_versions_and_names_those_that_it_takes(tmp_path: Path, version: tuple[int, int]) -> None:
    python = fake(tmp_path, "python", version)
    done = make("setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "Python 3.11, 3.12 or 3.13 is needed" in done.stderr and f"is 3.{version[1]}." in done.stderr
    assert not (tmp_path / "venv").exists()
