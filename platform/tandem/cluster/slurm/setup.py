"""Preparation of a Slurm cluster's shared file system for Tandem: the project, its environment or a container, and TANDEM_HOME.

The steps are pure; `run_step` runs one on a login node, here or over SSH. Each looks first whether its work is done.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

import yaml

from tandem.cluster.process import run_program
from tandem.cluster.slurm.script import exports, preparation
from tandem.cluster.ssh import SshConnection
from tandem.config.slurm import SlurmSite
from tandem.errors import ClusterError, ConfigError

DONE_STATUS = 77
"""Exit status of a step that finds its work done."""
STEP_S = 120.0
INSTALL_S = 3600.0
"""Seconds for what is downloaded: packages or an image."""
SOURCE_MARK = ".tandem-source"
"""File with the commit that was copied (`copying COMMIT` until it is whole), in a folder that `tandem slurm setup` fills."""
UNPACK_FOLDER = ".tandem-unpacked"
"""Folder in it that a commit is unpacked into, before its files are moved to their places."""
ARCHIVE = ".tandem-archive"
MAKE_FOLDERS = 'for each; do mkdir -p "../$each" || exit 1; done'
MOVE_FILES = 'for each; do mv -fT "$each" "../$each" || exit 1; done'
URI = "://"


@dataclass(frozen=True, kw_only=True, slots=True)
class SetupRequest:
    """Where Tandem is to be, on the cluster's shared file system."""

    folder: str
    """The project: a checkout that is there, or a copy of the one that runs this."""
    home: str
    """TANDEM_HOME."""
    lock: str
    """The lock file to install: `cpu` or `gpu`."""
    image_source: str | None = None
    """URI that the container's image is pulled from where it is not there."""

    def __post_init__(self) -> None:
        for path in (self.folder, self.home):
            if not path.startswith("/") or any(character.isspace() for character in path):
                raise ConfigError(
                    f"{path!r} must be an absolute path on the cluster's shared file system, without spaces."
                )

    @property
    def command(self) -> str:
        """The `tandem` command that the steps make, as a shell reads it: it sets TANDEM_HOME and loads the site's modules."""
        return shlex.quote(self.command_path)

    @property
    def command_path(self) -> str:
        """Its path."""
        return f"{self.folder}/tandem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step."""

    name: str
    is_done: str
    """A condition of bash."""
    command: str
    """Lines of bash; the first that fails ends them."""
    timeout_s: float = STEP_S


def steps(site: SlurmSite, request: SetupRequest) -> list[Step]:
    """The steps after the project is in its folder, in order."""
    # Jobs load the modules in their batch scripts; what is installed needs the same Python.
    modules = [f"module load {shlex.quote(module)}" for module in site.modules]
    folder, home_path = shlex.quote(request.folder), shlex.quote(request.home)
    wrapper = ["#!/bin/bash -l", *modules, f"export TANDEM_HOME={home_path}"]
    wrapper += [f'exec {shlex.quote(f"{request.folder}/.venv/bin/python")} -m tandem "$@"']
    home = Step(
        name=f"TANDEM_HOME, {request.home}",
        is_done=f'[ "$(stat -c %a {home_path} 2>/dev/null)" = 700 ]',
        command=f"mkdir -p {home_path} && chmod 700 {home_path}",
    )
    if site.container is not None:
        return [*_image_steps(site, request), home]
    environment = Step(
        name=f"environment, {request.folder}/.venv ({request.lock} lock)",
        is_done=f"make --question -C {folder} LOCK={request.lock} .venv/.ready-{request.lock} >/dev/null 2>&1",
        command=f"make -C {folder} LOCK={request.lock} setup",
        timeout_s=INSTALL_S,
    )
    return [
        environment,
        home,
        _file_step(f"command, {request.command_path}", request.command_path, "\n".join(wrapper), 0o755),
    ]


def site_step(values: Mapping[str, Any], request: SetupRequest) -> Step:
    """The site's config, for the jobs of this home; one that is there stays."""
    path = f"{request.home}/slurm.yaml"
    step = _file_step(f"site, {path}", path, site_lines(values), 0o600)
    return replace(step, is_done=f"[ -e {shlex.quote(path)} ]")


def site_lines(values: Mapping[str, Any]) -> str:
    """YAML of the site's config as the cluster needs it: all but the way to the login node."""
    kept = {name: value for name, value in values.items() if name != "login"}
    return yaml.safe_dump(kept, sort_keys=False).strip() if kept else "# No option differs from the defaults."


def login_lines(values: Mapping[str, Any], command: str) -> str:
    """YAML for the machines from which the cluster is reached: the way to the login node."""
    return yaml.safe_dump({"login": {**values["login"], "tandem": command}}, sort_keys=False).strip()


def _image_steps(site: SlurmSite, request: SetupRequest) -> list[Step]:
    container = site.container
    # A runtime reads an image by URI itself, and keeps it in a cache.
    if container is None or URI in container.image:
        return []
    image, runtime = shlex.quote(container.image), container.runtime
    missing = f"There is no image at {container.image}. Put it there, or say with --image-from where to pull it from."
    pull = f"echo {shlex.quote(missing)}; exit 1"
    if request.image_source is not None:
        pull = f'mkdir -p "$(dirname {image})" && {runtime} pull {image} {shlex.quote(request.image_source)}'
    return [Step(name=f"image, {container.image}", is_done=f"[ -e {image} ]", command=pull, timeout_s=INSTALL_S)]


def _file_step(name: str, path: str, content: str, mode: int) -> Step:
    text, new = shlex.quote(content), shlex.quote(f"{path}.new")
    path = shlex.quote(path)
    return Step(
        name=name,
        is_done=f'[ "$(cat {path} 2>/dev/null)" = {text} ]',
        command=f"printf '%s\\n' {text} > {new} && chmod {mode:o} {new} && mv {new} {path}",
    )


def run_step(step: Step, site: SlurmSite, ssh: SshConnection | None) -> bool:
    """Run a step on the login node (`ssh`; None: this machine). Returns whether there was anything to do.

    ClusterError with the end of its output if it fails.
    """
    script = [
        *preparation(site, exports(site, {})),
        f"if {step.is_done}; then exit {DONE_STATUS}; fi",
        "set -e",
        step.command,
    ]
    status, output = bash("\n".join(script), ssh, timeout_s=step.timeout_s)
    if status not in (0, DONE_STATUS):
        raise ClusterError(f"The step `{step.name}` ended with status {status}:\n{output.strip()[-3000:]}")
    return status == 0


def copy_project(root: Path, commit: str, request: SetupRequest, ssh: SshConnection | None) -> str:
    """Copy a commit of the checkout at `root` to the folder, unless it is there; returns what was found or done.

    A folder with files of another origin, such as a checkout of its own, stays as it is.
    """
    folder, mark = shlex.quote(request.folder), shlex.quote(f"{request.folder}/{SOURCE_MARK}")
    status, output = bash(f"mkdir -p {folder} && cat {mark} 2>/dev/null || ls -A {folder} | head -1", ssh)
    if status:
        raise ClusterError(f"{request.folder} cannot be made on the login node: {output.strip()}")
    if output.strip() == commit:
        return "is there"
    is_copy = bash(f"[ -e {mark} ]", ssh)[0] == 0
    if output.strip() and not is_copy:
        if bash(f"[ -e {folder}/Makefile ] && [ -d {folder}/requirements ]", ssh)[0]:
            raise ClusterError(
                f"{request.folder} has files, and is no checkout of Tandem. Name an empty folder, or a new one."
            )
        return "is a checkout of its own, and stays as it is"
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "project.tar"
        git(root, "archive", "--format=tar", f"--output={path}", commit)
        with path.open("rb") as archive:
            status, output = bash(_copy_lines(request.folder, commit, path.stat().st_size), ssh, stdin=archive)
    if status:
        raise ClusterError(f"{root} could not be copied to {request.folder}: {output.strip()}")
    return "copied"


def _copy_lines(folder: str, commit: str, size: int) -> str:
    """Bash that unpacks an archive of `size` bytes from its standard input into the folder.

    A mark says that it has begun, then that it is done. The archive is unpacked beside the files, so that a connection
    that is lost on the way changes none; then each file is renamed to its place.
    """
    mark = shlex.quote(f"{folder}/{SOURCE_MARK}")
    unpacked = shlex.quote(f"{folder}/{UNPACK_FOLDER}")
    lines = [
        "set -e",
        f"echo {shlex.quote(f'copying {commit}')} > {mark}",
        f"rm -rf {unpacked}",
        f"mkdir {unpacked}",
        f"cd {unpacked}",
        f"cat > ../{ARCHIVE}",
        # tar takes an archive that ends between two files for a whole one.
        f'[ "$(stat -c %s ../{ARCHIVE})" = {size} ] || {{ echo The archive did not arrive whole.; exit 1; }}',
        f"tar -x -f ../{ARCHIVE}",
        f"rm ../{ARCHIVE}",
        # Folders first; files that are there and not in the archive stay.
        f"find . -mindepth 1 -type d -exec sh -c {shlex.quote(MAKE_FOLDERS)} sh {{}} +",
        f"find . -mindepth 1 ! -type d -exec sh -c {shlex.quote(MOVE_FILES)} sh {{}} +",
        f"cd / && rm -rf {unpacked}",
        f"echo {shlex.quote(commit)} > {mark}",
    ]
    return "\n".join(lines)


def git(root: Path, *words: str) -> str:
    """Output of a git command in a checkout; ClusterError if it fails."""
    hint = "Clone Tandem into the folder on the cluster by hand."
    done = run_program(["git", "-C", str(root), *words], timeout_s=STEP_S, hint=hint)
    if done.returncode:
        raise ClusterError(f"`git {words[0]}` failed in {root}: {done.stderr.strip()} {hint}")
    return done.stdout


def bash(
    script: str, ssh: SshConnection | None, *, timeout_s: float = STEP_S, stdin: IO[bytes] | None = None
) -> tuple[int, str]:
    """Exit status and output of a script on the login node (`ssh`; None: this machine).

    The shell reads it from its standard input, since every user sees the words of commands; with `stdin`, which the script's
    commands read then, it is one of the words.
    """
    # A login shell over SSH: it defines `module`. The shell of a person who runs this on the login node has done so.
    shell = ["bash"] if ssh is None else ["bash", "--login"]
    shell += ["-s"] if stdin is None else ["-c", script]
    words = shell if ssh is None else ssh.words(shlex.join(shell))
    hint = "Run the same command again: it goes on where it ended."
    with TemporaryFile() as lines:
        # Read whole before it runs, so that none of its commands takes a part of it for its input.
        lines.write(f"{{\n{script}\n}} </dev/null\n".encode())
        lines.seek(0)
        done = run_program(words, timeout_s=timeout_s, hint=hint, stdin=lines if stdin is None else stdin)
    return done.returncode, done.stdout + done.stderr
