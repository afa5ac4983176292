"""Commands of the driver to all workers, which each worker gets in reply to its heartbeat."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class StopTraining:
    """Save a checkpoint after the current step, and return."""


@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Save a checkpoint after the current step, and continue."""

    request: int
    """Number of the request, from 1: a worker saves once for each."""


@dataclass(frozen=True, slots=True)
class DumpStacks:
    """Send the Python stack of the training thread with each heartbeat."""


Command = StopTraining | SaveCheckpoint | DumpStacks


@dataclass(frozen=True, kw_only=True, slots=True)
class StandingCommands:
    """Everything that the driver has commanded so far: a worker that misses a reply gets all of it with the next one."""

    stop: bool = False
    save_request: int = 0
    dump_stacks: bool = False

    def with_command(self, command: Command) -> StandingCommands:
        """The standing commands with one more."""
        match command:
            case StopTraining():
                return replace(self, stop=True)
            case SaveCheckpoint(request):
                return replace(self, save_request=request)
            case DumpStacks():
                return replace(self, dump_stacks=True)
