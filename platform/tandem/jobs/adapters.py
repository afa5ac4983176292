"""Adapter management for SDK, CLI and gateway: register from a folder, object store or job; promote, pin, delete, locate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError, EngineError, JobError, RegistryError
from tandem.jobs.folder import find_job
from tandem.registry import ModelRecord, Promotion, Registry
from tandem.registry.conditions import ALWAYS, Condition
from tandem.settings import settings
from tandem.storage import is_remote

# Inside the class, `list` is a method.
Records = list[ModelRecord]
Promotions = list[Promotion]
Residency = list[dict[str, Any]]


class Adapters:
    """Operations on adapters. They apply from the next request on; nothing is restarted."""

    def __init__(self, registry: Registry, find_api_url: Callable[[], str] | None = None) -> None:
        """`find_api_url` gives the URL of the app if TANDEM_API_URL is not set."""
        self.registry = registry
        self._find_api_url = find_api_url

    def register(
        self,
        name: str,
        source: str | Path,
        *,
        base: str | None = None,
        promote: bool = True,
        tenant: str | None = None,
    ) -> ModelRecord:
        """Register the adapter at `source`: a folder in peft's format, a URI such as s3://bucket/adapter, or a job's id.

        `tenant`: whom a new name belongs to; None: the tenant of its base, or all.
        The base of a job's adapter is known. Without `promote` it is a candidate, served under its id (`name@version`) only.
        Raises AdapterError, a RegistryError, with the reason if it cannot be served on `base`.
        """
        lineage: dict[str, Any] = {"source": str(source)}
        if not is_remote(source) and not Path(source).expanduser().exists():
            source, base, lineage = _adapter_of_job(str(source), base)
        if base is None:
            raise RegistryError(f"{source} does not say which registered model it adapts. Name it: base, or --base.")
        return self.registry.register_adapter(name, source, base=base, lineage=lineage, promote=promote, tenant=tenant)

    def list(self, all_versions: bool = False, *, after: str | None = None, limit: int | None = None) -> Records:
        """The promoted version of each name, or all versions; at most `limit`, after the name or id `after`."""
        return self.registry.list("adapter", all_versions, after=after, limit=limit)

    def marks(self, records: Records) -> dict[str, dict[str, bool]]:
        """By id, whether a version is promoted, and whether it is pinned."""
        promoted, pins = self.registry.promoted(records), set(self.registry.pins())
        return {
            record.id: {
                "promoted": record.id in promoted,
                "pinned": record.id in pins or (record.id in promoted and record.name in pins),
            }
            for record in records
        }

    def versions(self, name_or_id: str) -> Records:
        """One version (by id), or all of a name, oldest first. RegistryError if there is none, or if it is a model."""
        records = self.registry.versions(name_or_id)
        if records[0].kind != "adapter":
            raise RegistryError(f"{records[0].id} is a model, not an adapter. `tandem models rm` removes models.")
        return records

    def promote(self, version_id: str, condition: Condition = ALWAYS) -> ModelRecord:
        """Resolve `name` to `name@version` from the next request on; running requests finish with their version.

        ChangedMeanwhileError if `condition` does not hold.
        """
        return self.registry.promote(version_id, condition)

    def roll_back(self, name: str, condition: Condition = ALWAYS) -> ModelRecord:
        """Promote the version that was promoted before; conditions as in `promote`."""
        return self.registry.roll_back(name, condition)

    def promotions(self, name: str) -> Promotions:
        """Promotions of `name`, newest first."""
        return self.registry.promotions(name)

    def pin(self, name_or_id: str) -> ModelRecord:
        """Keep it loaded on every replica of its base."""
        return self.registry.pin(name_or_id)

    def unpin(self, name_or_id: str) -> bool:
        """Undo `pin`; False if it was not pinned."""
        return self.registry.unpin(name_or_id)

    def delete(self, name_or_id: str) -> Records:
        """Remove one version, or all of a name, from the registry. Files stay, and replicas keep their copies for a while."""
        return self.registry.remove(name_or_id, kind="adapter")

    def where(self) -> Residency:
        """Each replica of the app with its loaded adapters.

        ConfigError where neither TANDEM_API_KEY nor TANDEM_ADMIN_TOKEN is set, EngineError where no app answers or it refuses.
        """
        import httpx

        config = settings()
        token = config.admin_token or config.own_key
        if not token:
            raise ConfigError(
                "The residency of adapters is shown to admins only. Set TANDEM_API_KEY to a key with that role (`tandem keys "
                "create NAME --role admin`), or TANDEM_ADMIN_TOKEN to what the app was started with."
            )
        base = config.api_url or (self._find_api_url and self._find_api_url())
        if not base:
            raise ConfigError("TANDEM_API_URL is not set: it says where the app answers.")
        url = base.rstrip("/").removesuffix("/v1") + "/admin/residency"
        try:
            response = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30.0)
            content: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(f"No Tandem gateway answers at {url}: {error}. Set TANDEM_API_URL.") from error
        if response.status_code != 200:
            raise EngineError(str(content.get("error", {}).get("message", f"{url} answered {response.status_code}.")))
        return list(content["data"])


def _adapter_of_job(source: str, base: str | None) -> tuple[Path, str | None, dict[str, Any]]:
    """Folder, base and lineage of a job's adapter."""
    try:
        job = find_job(source)
    except JobError as error:
        raise RegistryError(f"{source} is no folder and no URI, and no job: {error}") from error
    end = job.finished()
    if end is None:
        raise RegistryError(
            f"The job {job.id} has no finished adapter in {job.export}. `tandem train status {job.id}` tells more."
        )
    config = job.config()
    if config.lora is None:
        raise RegistryError(f"The job {job.id} made a model, not an adapter.")
    return (
        job.export,
        base or end.base or config.model.base,
        {"job": job.id, "steps": config.steps, "loss": end.loss},
    )
