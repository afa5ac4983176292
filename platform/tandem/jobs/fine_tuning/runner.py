"""Runner of fine-tuning jobs: Ray Jobs whose results file is stored for the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tandem.errors import FileError
from tandem.files.content import ContentStore
from tandem.files.outputs import write_output
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.ids import fingerprint
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.fine_tuning.folder import FineTuningFolder
from tandem.jobs.fine_tuning.reports import results_csv
from tandem.jobs.fine_tuning.stored import create_folder
from tandem.jobs.runners.ray import RayRunner
from tandem.jobs.work.records import Job, split_run_name
from tandem.jobs.work.states import JobKind
from tandem.registry.conditions import Condition
from tandem.settings import settings


class FineTuningRunner(RayRunner):
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are Ray's submission ids."""

    def __init__(
        self, client: Callable[[], JobClient], files: FileStore, contents: ContentStore, tenant_bytes: int
    ) -> None:
        """`client`: of the cluster as it is now. `tenant_bytes`: of the files of one tenant at most."""
        super().__init__(client)
        self._files = files
        self._contents = contents
        self._tenant_bytes = tenant_bytes

    def start(self, job: Job) -> str:
        """See `Runner`."""
        create_folder(job)
        return super().start(job)

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`. The result names the results file, which is written now unless it was before.

        Where it cannot be stored, as its tenant has no bytes left, the job ends without it, and the result says why.
        """
        status = super().state(handle)
        if status is None or status.state is not RunState.FINISHED:
            return status
        try:
            results: dict[str, Any] = {"result_files": [self._results_file(split_run_name(handle)[0])]}
        except FileError as error:
            results = {"result_files": [], "notice": f"The results file was not stored: {error}"}
        return replace(status, result={**(status.result or {}), **results})

    def _results_file(self, job_id: str) -> str:
        folder = self._folder(job_id)
        record = write_output(
            self._files,
            self._contents,
            [results_csv(folder.typed_events()).encode()],
            tenant=folder.spec().tenant or "",
            purpose=Purpose.FINE_TUNE_RESULTS,
            filename=f"{job_id}-results.csv",
            quota_bytes=self._tenant_bytes,
            once=Condition(once=fingerprint(f"results of {job_id}")),
        )
        return record.id

    def _folder(self, job_id: str, kind: JobKind | None = None) -> FineTuningFolder:
        return FineTuningFolder(settings().jobs_dir / job_id)
