"""Records of the registry: one for each version of a model or an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tandem.ids import versioned

Kind = Literal["model", "adapter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryAddress:
    """URL and identity by which a process on any node opens one registry."""

    url: str = field(repr=False)
    """SQLAlchemy's, with the password."""
    identity: str
    """The database's own, drawn when it was made."""
    node: str | None = None
    """Address of the node that may open it, for a database that only one may; None: any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecord:
    """One version of a model or adapter; never changed once written."""

    name: str
    version: int
    """Counts from 1 within a name."""
    kind: Kind
    path: Path
    """Folder of safetensors in Hugging Face's (model) or peft's (adapter) format; of an adapter with a `uri` this node's copy,
    which may not be here yet: `local_folder` brings it."""
    digest: str
    """sha256 over a model's files, or over the two of an adapter."""
    uri: str | None = None
    """For an adapter in an object store: where."""
    base: str | None = None
    """For an adapter: the id (`name@version`) of the model that it adapts."""
    rank: int | None = None
    """For a LoRA adapter: its rank."""
    max_length: int | None = None
    """For a model: the positions that it was made for."""
    tenant: str | None = None
    """The tenant that its name belongs to; None: it is shared by all."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Where it came from: job, dataset digest, config digest, steps, final loss."""
    created_at: datetime
    """UTC."""

    @property
    def dora(self) -> bool:
        """Whether it is an adapter that has to be merged before it can be served."""
        return bool(self.lineage.get("dora"))

    @property
    def commit(self) -> str | None:
        """The commit on the Hugging Face hub that it was downloaded at; None for what is not from there."""
        return self.lineage.get("commit") if self.lineage.get("hub") else None

    @property
    def location(self) -> str:
        """The URI or folder that it was registered from."""
        return self.uri or str(self.path)

    @property
    def id(self) -> str:
        """`name@version`: what engines know it by, so that no version is ever taken for another."""
        return versioned(self.name, self.version)


class AdapterSummary(NamedTuple):
    """An adapter as lists show it: a small object, since a gateway holds one for each."""

    name: str
    id: str
    base: str
    """Id of its base model."""
    created: int
    """Seconds since 1970."""
    dora: bool
    tenant: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """A version that was made the one that its name means."""

    name: str
    version: int
    at: datetime
    """UTC."""
    taken_back: bool
    """By a roll-back, or because the version was removed."""

    @property
    def id(self) -> str:
        """Of the version."""
        return versioned(self.name, self.version)
