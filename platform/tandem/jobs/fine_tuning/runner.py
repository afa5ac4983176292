"""Runner of fine-tuning jobs: training jobs whose results file is stored for the client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.errors import FileError
from tandem.files.content import ContentStore
from tandem.files.outputs import write_output
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.ids import fingerprint
from tandem.jobs.dispatch.runner import Runner, RunState, RunStatus
from tandem.jobs.fine_tuning.folder import FineTuningFolder, training_folder
from tandem.jobs.fine_tuning.reports import results_csv
from tandem.jobs.fine_tuning.stored import create_folder, is_fine_tuning
from tandem.jobs.work.records import Job, split_run_name
from tandem.registry.conditions import Condition


class FineTuningRunner:
    """See `tandem.jobs.dispatch.runner.Runner`: another runner of training jobs, for fine-tuning jobs."""

    def __init__(self, runner: Runner, files: FileStore, contents: ContentStore, tenant_bytes: int) -> None:
        """`runner`: what runs the job's folder. `tenant_bytes`: of the files of one tenant at most."""
        self._runner = runner
        self._files = files
        self._contents = contents
        self._tenant_bytes = tenant_bytes

    def start(self, job: Job) -> str:
        """See `Runner`."""
        if is_fine_tuning(job):
            create_folder(job)
        return self._runner.start(job)

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        return self._runner.find(job)

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`. The result names the results file, which is written now unless it was before.

        Where it cannot be stored, as its tenant has no bytes left, the job ends without it, and the result says why.
        """
        status = self._runner.state(handle)
        folder = training_folder(split_run_name(handle)[0])
        if status is None or status.state is not RunState.FINISHED or not isinstance(folder, FineTuningFolder):
            return status
        try:
            results: dict[str, Any] = {"result_files": [self._results_file(folder, handle)]}
        except FileError as error:
            results = {"result_files": [], "notice": f"The results file was not stored: {error}"}
        return replace(status, result={**(status.result or {}), **results})

    def stop(self, job: Job) -> None:
        """See `Runner`."""
        self._runner.stop(job)

    def _results_file(self, folder: FineTuningFolder, handle: str) -> str:
        record = write_output(
            self._files,
            self._contents,
            [results_csv(folder.typed_events()).encode()],
            tenant=folder.spec().tenant or "",
            purpose=Purpose.FINE_TUNE_RESULTS,
            filename=f"{folder.id}-results.csv",
            quota_bytes=self._tenant_bytes,
            once=Condition(once=fingerprint(f"results of {handle}")),
        )
        return record.id
