"""Config of a Slurm site: what its cluster wants of each job, and how to reach it from elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta

from tandem.config import check
from tandem.config.ssh import SshConfig
from tandem.errors import ConfigError

TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")
"""Slurm's forms of a duration: minutes, minutes:seconds, hours:minutes:seconds, and each with days before it."""
WORD = re.compile(r"[\w.,:=+@%/\[\]&|*()-]+")
"""Values of sbatch's options; no spaces or quotes, so that none ends the line of the batch script that it stands in."""
RUNTIMES = ("apptainer", "singularity")


def time_limit(text: str) -> timedelta | None:
    """The duration of one of Slurm's forms; None for 0, which means no limit, and for what is of no such form."""
    if not TIME.fullmatch(text):
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # After days the first number is hours. Without them one or two numbers begin with minutes, and three with hours.
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return timedelta(days=int(days or 0), hours=hours, minutes=minutes, seconds=seconds) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerConfig:
    """The container in which Tandem runs on the nodes."""

    image: str
    """Path of the image, or a URI that the runtime reads."""
    runtime: str = "apptainer"
    binds: tuple[str, ...] = ()
    """Folders of the node that the container sees, `PATH` or `PATH:PATH_INSIDE`; TANDEM_HOME is one anyway."""
    arguments: tuple[str, ...] = ()
    """More arguments of the runtime's `exec`, such as `--nv` for NVIDIA GPUs."""
    python: str | None = None
    """The image's Python that has Tandem; unset: the path of the submitting command's, which the image has to have too."""

    def __post_init__(self) -> None:
        check.one_of("container.runtime", self.runtime, RUNTIMES)
        if not self.image:
            raise ConfigError("container.image is empty; it must be the path of an image.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoginConfig(SshConfig):
    """The way to the login node, for tunnels from a machine that has no Slurm."""

    tandem: str = "tandem"
    """The `tandem` command there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmSite:
    """One cluster with Slurm: what it wants of every job. `--site-set` overrides single values."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    time: str = "01:00:00"
    """Longest run time of a job."""
    cpus_per_node: int | None = None
    memory: str | None = None
    """Memory on each node, such as `64G`; unset: the partition's default."""
    gpu_type: str | None = None
    """The type of GPU that is asked for; unset: any."""
    options: tuple[str, ...] = ()
    """More options of sbatch, such as `--exclusive`."""
    modules: tuple[str, ...] = ()
    """Modules to load on each node."""
    commands: tuple[str, ...] = ()
    """Lines of bash to run on each node before Tandem starts."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set on each node."""
    container: ContainerConfig | None = None
    login: LoginConfig | None = None
    warning_s: int = 120
    """Seconds before the time limit at which a job is told to end: training writes a checkpoint, serving ends its streams."""

    def __post_init__(self) -> None:
        for name in ("partition", "account", "qos", "constraint", "reservation", "memory", "gpu_type"):
            value = getattr(self, name)
            if value is not None and not WORD.fullmatch(value):
                raise ConfigError(f"{name} is {value!r}; it must be one word, without spaces and quotes.")
        if not TIME.fullmatch(self.time):
            raise ConfigError(
                f"time is {self.time!r}; it must be of one of Slurm's forms, such as 30, 02:00:00 or 1-12:00:00."
            )
        for option in self.options:
            if not option.startswith("-") or not option.isprintable():
                raise ConfigError(f"options has {option!r}; each must be an option of sbatch, such as --exclusive.")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(f"environment has {name!r}; that is no name of a variable.")
        for name in ("modules", "commands"):
            for line in getattr(self, name):
                if "\n" in line or not line.strip():
                    raise ConfigError(f"{name} has {line!r}; each must be one line.")
        if self.cpus_per_node is not None:
            check.at_least("cpus_per_node", self.cpus_per_node, 1)
        check.between("warning_s", self.warning_s, 10, 3600)
