"""Dispatch of jobs in an app: the dispatcher with its runners, in a thread of the directory's process."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time

import ray

from tandem.apps.cluster_view import ServeReplicas, capacity
from tandem.cluster.local import Cluster
from tandem.cluster.slurm.site import read_site
from tandem.config import FilesConfig, SchedulingConfig
from tandem.config.serving.batches import BatchesConfig
from tandem.config.serving.jobs import JobsConfig
from tandem.errors import ClusterError, TandemError, UnknownJobError
from tandem.files.content import ContentStore
from tandem.files.store import FileStore
from tandem.jobs.batches.model_checks import ModelChecks
from tandem.jobs.batches.runner import BatchRunner
from tandem.jobs.batches.stored import RUNNER as BATCHES
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.chores import Chore
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.history import read_history
from tandem.jobs.dispatch.runner import Runner
from tandem.jobs.dispatch.scheduler import Scheduler
from tandem.jobs.file_jobs import release_files
from tandem.jobs.fine_tuning.runner import FineTuningRunner
from tandem.jobs.fine_tuning.stored import RUNNER as FINE_TUNING
from tandem.jobs.fine_tuning.stored import SLURM_RUNNER as SLURM
from tandem.jobs.folder_import import FolderImport
from tandem.jobs.folder_jobs import RUNNER as FOLDER_JOBS
from tandem.jobs.runners.ray import RayRunner
from tandem.jobs.runners.slurm import SlurmRunner
from tandem.jobs.tracking.capacity import CapacityRecorder, CapacityRecords
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.retention import JobRetention, Retention
from tandem.jobs.work.store import JobStore
from tandem.registry import RegistryAddress
from tandem.serve.directory import Directory

START_AFTER_S = 5.0
"""Seconds after which dispatching begins: an app's start has the CPU to itself."""
RELEASE_EVERY_S = 30.0
"""Seconds between two looks for files whose jobs have ended."""
UNKNOWN_AFTER_S = 600.0
"""Seconds for which a job that reads files may be missing: it is being created."""

log = logging.getLogger(__name__)


class ControlPlane(Directory):
    """The directory, and in a thread the dispatcher of jobs. Of several apps on one database, one dispatches."""

    def __init__(
        self,
        registry: RegistryAddress,
        files: FilesConfig,
        batches: BatchesConfig,
        scheduling: SchedulingConfig,
        jobs: JobsConfig,
        tls: bool = True,
    ) -> None:
        super().__init__(None, registry, None, tls)
        self._stop = threading.Event()
        threading.Thread(
            target=dispatch_jobs,
            args=(registry, files, batches, scheduling, jobs, self._stop),
            name="dispatcher",
            daemon=True,
        ).start()

    async def close(self) -> None:
        """Close all connections; the lead goes to another process."""
        self._stop.set()
        await super().close()


def dispatch_jobs(
    registry: RegistryAddress,
    files_config: FilesConfig,
    batches: BatchesConfig,
    scheduling: SchedulingConfig,
    jobs: JobsConfig,
    stop: threading.Event,
) -> None:
    """Dispatch the jobs in a registry's database until `stop` is set."""
    if stop.wait(START_AFTER_S):
        return
    with contextlib.ExitStack() as stores:
        store, files = stores.enter_context(JobStore.at(registry)), stores.enter_context(FileStore.at(registry))
        queue, retention = stores.enter_context(ItemQueue.at(registry)), stores.enter_context(JobRetention.at(registry))
        checks = stores.enter_context(ModelChecks.at(registry))
        runners = make_runners(registry, files_config, batches, store, files, queue, checks)
        keep_s = None if jobs.keep_days is None else jobs.keep_days * 86400
        replicas = ServeReplicas(scheduling.serving_level)
        records = stores.enter_context(CapacityRecords.at(registry))
        chores: list[Chore] = [
            FolderImport(store, functools.partial(job_client, registry), keep_s=keep_s),
            CapacityRecorder(lambda: capacity(replicas), store, records, scheduling),
        ]
        if keep_s is not None:
            chores.append(Retention(retention, keep_s))
        scheduler = Scheduler(scheduling, functools.partial(read_history, store))
        dispatcher = Dispatcher(store, runners, lambda: capacity(replicas), decide=scheduler, chores=chores)
        releases = threading.Thread(
            target=FileReleases(store, files).run, args=(stop,), name="file-releases", daemon=True
        )
        releases.start()
        dispatcher.run(stop)
        releases.join()


def make_runners(
    registry: RegistryAddress,
    files_config: FilesConfig,
    batches: BatchesConfig,
    store: JobStore,
    files: FileStore,
    queue: ItemQueue,
    checks: ModelChecks,
) -> dict[str, Runner]:
    """The runners of an app's cluster, by the names that jobs give."""
    contents = ContentStore.open(registry.identity, files_config.location)
    client = functools.partial(job_client, registry)
    return {
        FOLDER_JOBS: RayRunner(client),
        FINE_TUNING: FineTuningRunner(RayRunner(client), files, contents, files_config.tenant_bytes),
        SLURM: FineTuningRunner(SlurmRunner(read_site), files, contents, files_config.tenant_bytes),
        BATCHES: BatchRunner(
            store,
            queue,
            checks,
            files,
            contents,
            tenant_bytes=files_config.tenant_bytes,
            max_attempts=batches.max_attempts,
        ),
    }


class FileReleases:
    """Releases the files of jobs that have ended, so that they can be deleted."""

    def __init__(self, store: JobStore, files: FileStore) -> None:
        self._store = store
        self._files = files
        self._missing_since: dict[str, float] = {}
        """Monotonic time at which a job was first not found."""

    def run(self, stop: threading.Event) -> None:
        """Look every RELEASE_EVERY_S seconds until `stop` is set."""
        while not stop.wait(RELEASE_EVERY_S):
            try:
                self.release()
            except TandemError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("The files of jobs that have ended could not be released. It is tried again.")

    def release(self) -> list[str]:
        """Release now; returns the jobs whose files are released."""
        return [job_id for job_id in sorted(self._files.readers()) if self._release(job_id)]

    def _release(self, job_id: str) -> bool:
        """Release the files of a job that has ended, or is missing for long; whether it did."""
        try:
            return release_files(self._store, self._files, job_id)
        except UnknownJobError:
            since = self._missing_since.setdefault(job_id, time.monotonic())
            if time.monotonic() - since <= UNKNOWN_AFTER_S:
                return False
        self._files.release(job_id)
        self._missing_since.pop(job_id, None)
        return True


def job_client(registry: RegistryAddress) -> JobClient:
    """The client of the jobs of the cluster that this process is part of, which use a registry.

    ClusterError if the dashboard does not answer.
    """
    from ray.dashboard.utils import get_address_for_submission_client

    address = ray.get_runtime_context().gcs_address
    try:
        url = get_address_for_submission_client(address)
    except Exception as error:  # Ray raises many kinds here
        raise ClusterError(f"The dashboard of the cluster at {address} is not known: {error}") from error
    return _client_at(url, address, registry)


@functools.lru_cache(maxsize=1)
def _client_at(url: str, address: str, registry: RegistryAddress) -> JobClient:
    """Kept: a new client asks the dashboard for its version first, and runners need one for each look at a job."""
    # Every node of an app has Tandem at the same path.
    return JobClient(Cluster(dashboard_url=url, address=address, local=True), registry)
