"""Other programs (ssh, Slurm, Ray's launcher), run to their end within a time limit."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from tandem.errors import ClusterError

SHOWN_CHARACTERS = 200
"""Longest part of a command that an error shows."""


def run_program(
    command: Sequence[str],
    *,
    timeout_s: float,
    hint: str,
    environment: Mapping[str, str] | None = None,
    quiet: bool = True,
    stdin: IO[bytes] | None = None,
    name: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program, without input unless `stdin` is given; its exit status is the caller's to judge.

    `quiet` captures its output, which else goes to the terminal. ClusterError if the program is not on this machine, or if it
    runs for longer than `timeout_s` and is killed; `hint` is what the message says to do then, and `name` what it calls the
    command (unset: its words).
    """
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            capture_output=quiet,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(f"This machine has no `{command[0]}`. {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{name or shown(command)} did not end within {timeout_s:g} s. {hint}") from error


def shown(command: Sequence[str]) -> str:
    """A command as a message shows it."""
    text = shlex.join(command)
    return f"`{text}`" if len(text) <= SHOWN_CHARACTERS else f"`{text[:SHOWN_CHARACTERS]}...`"
