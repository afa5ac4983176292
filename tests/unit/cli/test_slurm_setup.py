"""`tandem slurm setup` on this machine, with a small project in the place of Tandem's and without a compute node."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import pytest
import yaml
from typer.testing import CliRunner

import tandem
from tandem.cli.main import app
from tandem.cluster.slurm import setup
from tandem.cluster.slurm.setup import SetupRequest, Step, run_step, steps
from tandem.config.load import from_dict
from tandem.config.slurm import SlurmSite
from tandem.errors import ClusterError

MAKEFILE = """\
LOCK ?= cpu
setup: .venv/.ready-$(LOCK)
.venv/.ready-$(LOCK): requirements/$(LOCK).lock
	@mkdir -p .venv/bin
	@printf '#!/bin/sh\\necho "$$TANDEM_HOME: $$*"\\n' > .venv/bin/python
	@chmod 755 .venv/bin/python
	@touch $@
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with lock files, which the command takes for its own."""
    root = tmp_path / "project"
    for path in (root / "platform" / "tandem", root / "requirements"):
        path.mkdir(parents=True)
    (root / "Makefile").write_text(MAKEFILE)
    for name in ("cpu", "gpu"):
        (root / "requirements" / f"{name}.lock").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    monkeypatch.setattr(tandem, "__file__", str(root / "platform" / "tandem" / "__init__.py"))
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    monkeypatch.setenv("TANDEM_HOME", str(own))
    return root


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["slurm", "setup", *arguments], env={"COLUMNS": "250"})
    return result.exit_code, result.stdout + result.stderr


def test_each_step_is_done_once_and_the_command_works_afterwards(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared" / "tandem"
    (project / "untracked").touch()
    status, shown = run(str(folder), "--no-check", "--gpus-per-node", "2", "--site-set", "partition=gpu")
    assert status == 0, shown
    assert "copied as committed, without the changes since" in shown and "(gpu lock): made" in shown
    assert "  partition: gpu\n" in shown and "login:" not in shown
    assert yaml.safe_load((folder / "home" / "slurm.yaml").read_text()) == {"partition": "gpu"}
    assert stat.S_IMODE((folder / "home").stat().st_mode) == 0o700
    answer = subprocess.run([str(folder / "tandem"), "doctor"], capture_output=True, text=True, check=True).stdout
    assert answer == f"{folder}/home: -m tandem doctor\n"

    status, shown = run(str(folder), "--no-check", "--gpus-per-node", "2", "--site-set", "partition=other")
    assert status == 0 and shown.count(": is there\n") == 5 and "made" not in shown
    assert yaml.safe_load((folder / "home" / "slurm.yaml").read_text()) == {"partition": "gpu"}

    # A new lock is installed, a new commit copied.
    (project / "requirements" / "gpu.lock").write_text("a==1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(project), *identity, "commit", "-aqm", "second"], check=True)
    status, shown = run(str(folder), "--no-check", "--lock", "gpu")
    assert status == 0 and "copied" in shown and (folder / "requirements" / "gpu.lock").read_text() == "a==1\n"


def test_a_copy_that_was_interrupted_is_made_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    bash = setup.bash

    def cut(script: str, ssh: None, *, timeout_s: float = 9.0, stdin: IO[bytes] | None = None) -> tuple[int, str]:
        with TemporaryFile() as part:
            # As a connection that is lost on the way.
            part.write(b"" if stdin is None else stdin.read(1536))
            part.seek(0)
            return bash(script, ssh, timeout_s=timeout_s, stdin=None if stdin is None else part)

    monkeypatch.setattr(setup, "bash", cut)
    status, shown = run(str(folder), "--no-check")
    assert status != 0 and "did not arrive whole" in shown
    # Nothing is in its place yet, and the mark says why.
    assert sorted(each.name for each in folder.iterdir()) == [".tandem-archive", ".tandem-source", ".tandem-unpacked"]
    assert (folder / ".tandem-source").read_text().startswith("copying ")
    monkeypatch.setattr(setup, "bash", bash)
    status, shown = run(str(folder), "--no-check")
    assert status == 0 and "copied" in shown and (folder / "requirements" / "gpu.lock").exists()
    assert not (folder / ".tandem-unpacked").exists() and not (folder / ".tandem-archive").exists()


def test_paths_are_quoted(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a';touch$IFS$0;'&b"
    status, shown = run(str(folder), "--no-check")
    assert status == 0, shown
    answer = subprocess.run([str(folder / "tandem"), "doctor"], capture_output=True, text=True, check=True).stdout
    assert answer == f"{folder}/home: -m tandem doctor\n"
    assert run(str(folder), "--no-check")[1].count(": is there\n") == 5


def test_a_folder_with_other_files_is_left_alone(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").touch()
    status, shown = run(str(folder), "--no-check")
    assert status != 0 and "is no checkout of Tandem" in shown and [p.name for p in folder.iterdir()] == ["chapter.tex"]


def test_a_step_that_fails_says_which_and_why(project: Path, tmp_path: Path) -> None:
    (project / "Makefile").write_text("setup:\n\t@echo no such package; exit 1\n")
    subprocess.run(
        ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-aqm", "x"], check=True
    )
    status, shown = run(str(tmp_path / "shared"), "--no-check")
    assert status != 0 and "The step `environment" in shown and "no such package" in shown


def test_an_image_is_pulled_where_it_is_not_there(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, image = tmp_path / "tools", tmp_path / "images" / "tandem.sif"
    tools.mkdir()
    (tools / "apptainer").write_text('#!/bin/sh\necho "$1 $3" > "$2"\n')
    (tools / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    arguments = (str(tmp_path / "shared"), "--no-check", "--site-set", f"container.image={image}")
    status, shown = run(*arguments)
    assert status != 0 and f"There is no image at {image}" in shown
    status, shown = run(*arguments, "--image-from", "docker://example.org/tandem:1")
    assert status == 0 and image.read_text() == "pull docker://example.org/tandem:1\n" and "environment" not in shown
    status, shown = run(*arguments)
    assert status == 0 and f"image, {image}: is there" in shown


def test_a_step_gets_the_variables_by_its_standard_input() -> None:
    site = SlurmSite(environment={"HF_TOKEN": "hf_x"})
    step = Step(name="a", is_done="false", command="tr '\\0' ' ' < /proc/$$/cmdline; cat; echo; echo $HF_TOKEN; exit 1")
    with pytest.raises(ClusterError, match="status 1:\nbash -s \nhf_x"):
        run_step(step, site, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("relative",), "must be an absolute path"),
        (("/a b",), "without spaces"),
        (("/x", "--lock", "tpu"), "cpu or gpu"),
    ],
)
def test_what_cannot_be_is_refused(project: Path, arguments: tuple[str, ...], said: str) -> None:
    status, shown = run(*arguments)
    assert status != 0 and said in shown


def test_the_command_loads_the_modules_that_jobs_load() -> None:
    site = from_dict(SlurmSite, {"modules": ["python/3.11", "cuda"]})
    commands = steps(site, SetupRequest(folder="/s", home="/s/home", lock="cpu"))[-1].command
    assert "module load python/3.11\nmodule load cuda\nexport TANDEM_HOME=/s/home" in commands
