"""A gateway with jobs of two tenants in its database, keys of each role, and no cluster. Real HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from gateway_world import World, running

from tandem.auth import KeyStore, Role
from tandem.config import FilesConfig
from tandem.errors import ClusterError, JobError
from tandem.jobs.work.records import Job, JobSubmission, Lease
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore
from tandem.observability.journal import Journal
from tandem.registry import Registry
from tandem.settings import settings


@dataclass
class ClusterLogs:
    """Logs of a cluster by submission, as its dashboard has them."""

    lines: dict[str, list[str]] = field(default_factory=dict)
    is_away: bool = False

    def log_lines(self, submission: str) -> Iterator[str]:
        """See `LogSource`."""
        if self.is_away:
            raise ClusterError("The dashboard does not answer.")
        if submission not in self.lines:
            raise JobError(f"The cluster has no log of {submission}.")
        yield from self.lines[submission]


@dataclass
class JobsWorld:
    """A gateway: `trainer` and `user` are keys of the tenant lab, `other` of another one, `admin` sees all."""

    world: World
    url: str
    keys: dict[str, str]
    store: JobStore
    logs: ClusterLogs

    def submit(self, name: str = "a", **options: object) -> str:
        submission = JobSubmission(**{"kind": JobKind.TRAIN, "name": name, "spec": {}, "tenant": "lab", **options})  # type: ignore[arg-type]
        return self.store.submit(submission).job.id

    def start(self, job_id: str) -> tuple[Job, Lease]:
        job = self.store.claim(job_id, "dispatcher", 60)
        assert job is not None and job.lease is not None
        return self.store.started(job.lease, job.run_name), job.lease

    def journal(self, job_id: str) -> Journal:
        folder = settings().jobs_dir / job_id
        folder.mkdir(parents=True, exist_ok=True)
        return Journal(folder / "events.jsonl", prints=False)

    def http(self, key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.keys[key]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20)


@contextlib.asynccontextmanager
async def jobs_world(tmp_path: Path, **options: Any) -> AsyncIterator[JobsWorld]:
    keys = KeyStore.at(Registry(f"sqlite:///{tmp_path}/tandem.db").address)
    secrets = {
        name: keys.create(name, tenant=tenant, role=role, by="test").secret
        for name, tenant, role in (
            ("trainer", "lab", Role.TRAINER), ("user", "lab", Role.USER), ("other", "other", Role.TRAINER),
            ("admin", "other", Role.ADMIN),
        )
    }  # fmt: skip
    logs = ClusterLogs()
    config = FilesConfig(location=str(tmp_path / "files"))
    async with running(tmp_path, files=config, run_logs=lambda: logs, **options) as world:
        store = JobStore.at(world.registry.address)
        yield JobsWorld(world, str(world.http.base_url).rstrip("/"), secrets, store, logs)
        store.close()
