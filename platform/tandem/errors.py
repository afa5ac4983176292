"""Exception tree. Every message states the fact, the numbers and the next step.

TandemError
├── ConfigError          a key or value that cannot be
├── DataError            a corpus, shard or row that cannot be used
├── LayoutError          parallel degrees that do not fit the workers or the model
├── CheckpointError      a checkpoint that is not whole
├── StorageError         a disk or store that refused
│   └── UnsafePathError     a file or folder that another user can change
├── RegistryError
│   ├── RegistryUnreachableError  its database does not answer: later it may
│   ├── UnknownModelError   no model or adapter of that name
│   │   └── UnknownVersionError  the name is known, and has no such version, or none that is promoted
│   └── AdapterError        an adapter's files that cannot be served
├── HubError             a model or dataset of the Hugging Face hub that cannot be had
│   └── HubUnreachableError  the hub does not answer, or HF_HUB_OFFLINE is set
├── ClusterError         no Ray cluster, or one that refused
├── JobError             a job that failed or does not exist
│   ├── JobStopped          a job that was told to stop, and can go on
│   ├── UnknownJobError     no job of that id
│   ├── UnknownLogError     no log of a job's run is kept
│   ├── IllegalTransitionError  an action that a job's state does not allow
│   ├── LeaseLostError      a write of a worker or dispatcher that does not hold the lease any more
│   └── IdempotencyConflictError  an idempotency key that belongs to another request
├── FileError            an uploaded file, or an upload in parts, that cannot be used
│   ├── UnknownFileError    no file or upload of that id
│   ├── FileInUseError      a job that has not ended reads it
│   └── FileQuotaError      its tenant has no bytes left
├── AuthError            an API key that cannot be made or changed
│   └── UnknownKeyError     no API key of that id or name
├── EngineError          an engine that cannot start or go on
│   └── PromptError         one prompt of many that was not answered
└── EnvironmentProblem   a machine that lacks something
"""

from __future__ import annotations

import difflib
import heapq
import itertools
from collections.abc import Iterable

LONGEST_COMPARED, MOST_KNOWN, MOST_COMPARED = 64, 512, 5
"""Bounds of `did_you_mean`: characters of a word, known names, and names of these that are compared letter by letter."""


class TandemError(Exception):
    """Base of all errors a user can act on. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(TandemError):
    """A configuration key or value that cannot be."""

    exit_code = 2


class DataError(TandemError):
    """A corpus, shard or row that cannot be used."""


class LayoutError(TandemError):
    """Parallel degrees that do not fit the workers or the model."""

    exit_code = 2


class CheckpointError(TandemError):
    """A checkpoint that is not whole, or is of something else."""


class StorageError(TandemError):
    """A disk or object store that refused to read or write."""


class UnsafePathError(StorageError):
    """A file or folder that another user of the machine owns or can change, where only this user's may be trusted."""


class FileError(TandemError):
    """An uploaded file, or an upload in parts, that cannot be used. `param`: the field of a request that is at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownFileError(FileError):
    """No file or upload has that id, or another tenant has it."""


class FileInUseError(FileError):
    """A file that a job reads which has not ended."""


class FileQuotaError(FileError):
    """A file for which its tenant has no bytes left."""


class AuthError(TandemError):
    """An API key that cannot be made or changed."""


class UnknownKeyError(AuthError):
    """No API key has that id, and no active one that name."""


class KeyMadeBeforeError(AuthError):
    """An API key that was made before under the same idempotency key; its secret is told once."""


class RegistryError(TandemError):
    """The registry refused a record."""


class RegistryUnreachableError(RegistryError):
    """The registry's database does not answer, or lets nobody read or write now; later it may."""


class UnknownModelError(RegistryError):
    """No model or adapter of that name is registered."""


class UnknownVersionError(UnknownModelError):
    """The name is registered, but has no such version, or none that is promoted."""


class ChangedMeanwhileError(RegistryError):
    """A name means another version than the one that a change expects."""


class AdapterError(RegistryError):
    """An adapter whose files cannot be served: the fault is in them, not in what was asked to serve them."""


class HubError(TandemError):
    """A model or dataset of the Hugging Face hub that cannot be had: gated, without such a revision, or of no use here."""


class HubUnreachableError(HubError):
    """The hub does not answer, or may not be asked."""


class ClusterError(TandemError):
    """No Ray cluster could be reached or started."""


class JobError(TandemError):
    """A job that failed, or that does not exist."""


class JobStopped(JobError):
    """A job that was told to stop; it has left what it takes to go on."""

    exit_code = 143


class UnknownJobError(JobError):
    """No job or queue item has that id."""


class UnknownLogError(JobError):
    """A run of a job has no log, or none that was kept."""


class IllegalTransitionError(JobError):
    """An action that the state of a job or queue item does not allow."""


class LeaseLostError(JobError):
    """A write of a worker or dispatcher whose lease was taken over, or has been given back: nothing was changed."""


class IdempotencyConflictError(JobError):
    """An idempotency key that was sent before, with another request."""


class EngineError(TandemError):
    """An engine that cannot start, or cannot go on."""


class PromptError(EngineError):
    """One prompt of many that was not answered; `index` is its place among them, from 0."""

    def __init__(self, message: str, *, index: int) -> None:
        super().__init__(message)
        self.index = index


class EnvironmentProblem(TandemError):
    """This machine lacks something that Tandem needs."""


def sentence(text: str) -> str:
    """The text with a full stop, unless it ends a sentence already."""
    text = text.rstrip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'X'?` for the known name nearest to `word`, at least `cutoff` (0 to 1) alike, else the empty string.

    Takes less than a millisecond, whatever is given: the gateway calls it in its event loop with words that clients chose. So
    words above `LONGEST_COMPARED` have no near one, and of `MOST_KNOWN` names those are compared that share most pairs of
    letters with the word.
    """
    if len(word) > LONGEST_COMPARED:
        return ""
    pairs = {word[place : place + 2] for place in range(len(word) - 1)}

    def likeness(name: str) -> float:
        return sum(map(name.__contains__, pairs)) - abs(len(name) - len(word)) / 2

    names = heapq.nlargest(MOST_COMPARED, itertools.islice(known, MOST_KNOWN), key=likeness)
    near = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
