"""Settings from environment variables; the only module that reads `os.environ`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tandem.errors import ConfigError, UnsafePathError
from tandem.private import read_private_file

LONGEST_DRAIN_S = 3600
"""How long a stream may go on, at most, in what is to end: HAProxy, which is told when its cluster starts, cuts it then."""

EMPTY_IS_UNSET = ("TANDEM_", "RAY_", "VLLM_")
"""Prefixes of variables that children do not get when they are empty."""


class Settings(BaseSettings):
    """What the environment says. `TANDEM_<NAME>` sets each, except where another variable is named; empty means unset."""

    model_config = SettingsConfigDict(
        env_prefix="TANDEM_", extra="ignore", populate_by_name=True, env_ignore_empty=True
    )

    home: Path = Field(default_factory=lambda: Path.home() / ".tandem")
    """Where jobs, models and the registry live; every node of a cluster must see it at the same path."""
    database_url: str | None = None
    """SQLAlchemy URL of the registry; SQLite in `home` when unset. PostgreSQL where a cluster has more than one node."""
    registry_id: str | None = None
    """The identity that the registry must have; set for jobs, so that none makes an empty registry on another node."""
    ray_address: str | None = Field(default=None, validation_alias="RAY_ADDRESS")
    """The cluster to use: `host:port`, or `http://host:8265` for its dashboard. Unset: a local one is started."""
    api_url: str | None = None
    """Where `tandem chat` and other commands ask; unset: the app of this home, or `port` on this machine."""
    api_key: str | None = None
    """The key they send; unset: the one in the file `api_key` of `home`, which `tandem quickstart` makes."""
    serve_config: Path | None = None
    """The YAML that `serve run serve_apps.openai:app` serves when it is given no arguments."""
    port: int = 8000
    """The gateway's port."""
    admin_token: str | None = None
    """An admin's key that needs no database: set where the app is started, it opens the gateway's /admin routes."""
    tls_certificate: Path | None = None
    """Certificate of the public listener, as `listen.tls` in the serve config; on clusters of `tandem node start` it is set where
    each node is started."""
    tls_key: Path | None = None
    """The certificate's private key."""
    connections_per_address: int = Field(default=2048, ge=1)
    """Connections of one client address at a node's listener; all clients behind a proxy or a tunnel have one address."""
    runtime_dir: Path | None = None
    """A short, private folder on this machine for the sockets and files of a cluster's node; unset: /tmp/tandem-UID."""
    cache: Path = Field(default_factory=lambda: Path.home() / ".cache" / "tandem")
    """A folder of this node's own, for copies of what lies in object stores."""
    adapter_cache_gib: float = 20.0
    """How much of it adapters may take; the longest unused make room."""
    model_cache_gib: float = 500.0
    """How much of it base models may take; the longest unused that no process uses make room."""
    max_workers: int | None = Field(default=None, ge=1)
    """Workers that an elastic training job takes at most; set for jobs that a scheduler starts (docs/concepts/scheduling.md)."""
    cordon_on: str | None = None
    """Kinds of bad findings, such as `gpu_xid,gpu_ecc`, that keep a node out by themselves (docs/guides/node-health.md)."""

    @property
    def api_key_file(self) -> Path:
        """The key of this home's own user."""
        return self.root / "api_key"

    @property
    def own_key(self) -> str | None:
        """The key of TANDEM_API_KEY, or of the home's file; None: there is none."""
        if self.api_key is None:
            # In a home of several users the file belongs to one of them.
            with contextlib.suppress(OSError, UnsafePathError):
                return read_private_file(self.api_key_file).strip() or None
        return self.api_key

    @property
    def sent_key(self) -> str:
        """The key that commands send; SDKs send something where there is none, too."""
        return self.own_key or "tandem"

    @property
    def root(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def adapter_cache(self) -> Path:
        """One folder an adapter that was fetched, named by its digest."""
        return self.cache.expanduser().resolve() / "adapters"

    @property
    def model_cache(self) -> Path:
        """One folder a model that was fetched, named by its fingerprint."""
        return self.cache.expanduser().resolve() / "models"

    @property
    def registry_url(self) -> str:
        """The registry's SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.root}/tandem.db"

    @property
    def jobs_dir(self) -> Path:
        """One folder a job: config, events, checkpoints, export."""
        return self.root / "jobs"

    @property
    def sweeps_dir(self) -> Path:
        """One folder a sweep; its trials are jobs among the others."""
        return self.root / "sweeps"

    @property
    def data_dir(self) -> Path:
        """Datasets that `tandem data build` made."""
        return self.root / "data"

    @property
    def hub_dir(self) -> Path:
        """Models and datasets of the Hugging Face hub, in the layout of huggingface_hub's cache."""
        return self.root / "cache" / "hub"


def settings() -> Settings:
    """The settings as the environment has them now; ConfigError for a value that cannot be."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        variable_name = (
            name.upper() if name.isupper() else f"{Settings.model_config.get('env_prefix', '')}{name.upper()}"
        )
        raise ConfigError(f"{variable_name} is {first['input']!r}: {first['msg']}.") from error


def child_environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment for a child, with `extra` laid over it; a value of None removes the name.

    Empty variables of Tandem, Ray and vLLM are left out: those libraries do not all take an empty one for unset.
    """
    environment = {name: value for name, value in os.environ.items() if value or not name.startswith(EMPTY_IS_UNSET)}
    for name, value in (extra or {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    return environment


def export(variables: Mapping[str, str], *, override: bool = False) -> None:
    """Set variables that a library reads for itself (Ray, vLLM, OpenMP); what the user has set, and not to nothing, stays."""
    for name, value in variables.items():
        if override or not os.environ.get(name):
            os.environ[name] = value


def variable(name: str) -> str | None:
    """One variable that belongs to a library; None where it is unset or empty."""
    return os.environ.get(name) or None


def hub_offline() -> bool:
    """Whether the user has switched the Hugging Face hub off, as huggingface_hub reads it."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def forget(name: str, value: str) -> None:
    """Undo `export` of a variable, if it still has that value."""
    if os.environ.get(name) == value:
        del os.environ[name]
