"""The batch script of a Slurm job. Pure: config and request in, text out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.cluster.slurm.folder import LEAVE_FILE, STOP_FILE, TIME_LIMIT, JobFolder, Submission
from tandem.config.slurm import ContainerConfig, SlurmSite

REQUEUE_STATUS = 75
"""Exit status of a job's first node that asks to be queued again: the work is not done (EX_TEMPFAIL of sysexits.h)."""
RUNTIME_PREFIX = "ts-"
"""How the names of jobs' runtime folders in /tmp begin; short, because paths of sockets are."""
SECRET_NAME = re.compile("PASSWORD|TOKEN|KEY|SECRET|URL", re.IGNORECASE)
"""Parts of the names of variables whose values are not shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """What a batch script is made for."""

    submission: Submission
    folder: JobFolder
    tandem: tuple[str, ...]
    """Words of the `tandem` command on the nodes, such as the path of an environment's Python, `-m` and `tandem`."""
    variables: Mapping[str, str]
    """Variables of Tandem and Ray on the nodes."""
    home: Path

    @property
    def requeue(self) -> bool:
        """Whether the job is queued again when its first node asks for it, or a node fails."""
        return not self.submission.serves

    @property
    def node_folder(self) -> str:
        """The folder of the job, or of each task of an array, as bash reads it."""
        folder = shlex.quote(str(self.folder.path))
        return f'{folder}/tasks/"$SLURM_ARRAY_TASK_ID"' if self.submission.tasks else folder


def render(site: SlurmSite, request: JobRequest) -> str:
    """The script. Each node runs `tandem slurm node FOLDER`, which starts Ray; the first one runs the job's command."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options(site, request)), ""]
    lines += ["set -u", *preparation(site, [source(request.folder.environment)])]
    if request.submission.tasks:
        # Tasks may share a node.
        lines += ['export TANDEM_RUNTIME_DIR="$TANDEM_RUNTIME_DIR-$SLURM_ARRAY_TASK_ID"']
    # Drivers of training jobs are started as `python`.
    lines += [f'export PATH={shlex.quote(str(Path(request.tandem[0]).parent))}:"$PATH"']
    words = [shlex.join(request.tandem), "slurm", "node", request.node_folder]
    if site.container is not None:
        words = [*container_words(site.container, request.home), *words]
    lines += [
        "# Slurm sends SIGUSR1 to this shell before the time limit. Sent to the step, it would end every process of Ray.",
        f"""trap 'echo "$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}} {TIME_LIMIT}" > {request.node_folder}/{STOP_FILE}' USR1""",
        "# A node that fails does not end the others.",
        f"srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 {' '.join(words)} &",
        "step=$!",
        'wait "$step"; status=$?',
        "# A signal ends `wait` before the step has ended.",
        'while [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done',
    ]
    if request.requeue:
        is_wanted = f'[ "$status" -eq {REQUEUE_STATUS} ] && [ ! -e {request.node_folder}/{LEAVE_FILE} ]'
        lines += [f'if {is_wanted}; then scontrol requeue "$SLURM_JOB_ID"; fi']
    return "\n".join([*lines, 'exit "$status"', ""])


def exports(site: SlurmSite, variables: Mapping[str, str], *, hidden: bool = False) -> list[str]:
    """Lines of bash that set the variables of a node, those of the site too; `hidden`: without the values of secrets.

    They belong into a private file, or on a shell's standard input: every user of a machine sees the words of its commands.
    """
    values = {**site.environment, **variables}
    return [
        f"export {name}={'***' if hidden and SECRET_NAME.search(name) else shlex.quote(value)}"
        for name, value in values.items()
    ]


def source(path: Path) -> str:
    """The line of bash that runs a file's lines."""
    return f". {shlex.quote(str(path))} || exit 1"


def preparation(site: SlurmSite, set_variables: Sequence[str]) -> list[str]:
    """Lines of bash that a node needs before Tandem starts: modules, those that set its variables, and what the site wants."""
    modules = [f"module load {shlex.quote(module)}" for module in site.modules]
    return ["umask 077", *modules, *set_variables, *site.commands]


def options(site: SlurmSite, request: JobRequest) -> list[str]:
    """The options for sbatch."""
    found = [
        f"--job-name=tandem-{request.submission.kind}",
        f"--output={_log(request)}",
        "--open-mode=append",
        f"--nodes={request.submission.nodes}",
        "--ntasks-per-node=1",
        f"--time={site.time}",
        f"--signal=B:USR1@{site.warning_s}",
        "--requeue" if request.requeue else "--no-requeue",
    ]
    if request.submission.tasks:
        found.append(f"--array={array_range(request.submission.tasks, request.submission.tasks_at_once)}")
    return [*found, *resource_options(site, request.submission.gpus_per_node)]


def array_range(tasks: Sequence[int], at_once: int) -> str:
    """sbatch's form of the numbers of an array's tasks, and how many run at a time."""
    numbers = f"{tasks[0]}-{tasks[-1]}" if len(tasks) == tasks[-1] - tasks[0] + 1 else ",".join(map(str, tasks))
    return f"{numbers}%{at_once}" if at_once else numbers


def _log(request: JobRequest) -> str:
    """The file of the output; `%a` is the number of a task."""
    if not request.submission.tasks:
        return str(request.folder.log)
    return str(request.folder.path / "tasks" / "%a" / request.folder.log.name)


def resource_options(site: SlurmSite, gpus_per_node: int) -> list[str]:
    """Options of sbatch and srun that say where a job runs and what it gets."""
    values = {name: getattr(site, name) for name in ("partition", "account", "qos", "constraint", "reservation")}
    found = [f"--{name}={value}" for name, value in values.items() if value is not None]
    if site.cpus_per_node is not None:
        found.append(f"--cpus-per-task={site.cpus_per_node}")
    if site.memory is not None:
        found.append(f"--mem={site.memory}")
    if gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        found.append(f"--gres=gpu:{kind}{gpus_per_node}")
    return [*found, *site.options]


def container_words(container: ContainerConfig, home: Path) -> list[str]:
    """The words, quoted for bash, that run a command in the container."""
    binds = [str(home), *container.binds]
    words = [container.runtime, "exec", *(word for bind in binds for word in ("--bind", bind))]
    return [shlex.quote(word) for word in (*words, *container.arguments, container.image)]
