"""Folder of a fine-tuning job: a training job's folder whose config is written once its files have been read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tandem.config import from_dict, to_dict
from tandem.jobs.fine_tuning.spec import FineTuningSpec
from tandem.jobs.folder import JobFolder
from tandem.settings import settings
from tandem.storage import disk_errors, write_atomic

SPEC = "fine_tuning.json"


@dataclass(frozen=True, slots=True)
class FineTuningFolder(JobFolder):
    """The folder of one job, `jobs/ftjob-...`."""

    module: ClassVar[str] = "tandem.jobs.fine_tuning.driver"

    @classmethod
    def create(cls, spec: FineTuningSpec) -> FineTuningFolder:
        """A folder with the job's specification; the same one again where it exists. Raises StorageError."""
        path = settings().jobs_dir / spec.id
        with disk_errors("writing the job", path):
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / SPEC, json.dumps(to_dict(spec), indent=1), mode=0o600)
        return cls(path)

    @property
    def leave_s(self) -> float:
        """Seconds that it may take to save and exit; 0 before its config is written."""
        return self.config().faults.leave_s if (self.path / "config.yaml").exists() else 0.0

    def spec(self) -> FineTuningSpec:
        """The job's specification."""
        return read_spec(self.path)


def training_folder(job_id: str) -> JobFolder:
    """The folder of a training job, of a fine-tuning job too."""
    path = settings().jobs_dir / job_id
    return FineTuningFolder(path) if (path / SPEC).exists() else JobFolder(path)


def read_spec(folder: Path) -> FineTuningSpec:
    """The specification in a job's folder."""
    return from_dict(FineTuningSpec, json.loads((folder / SPEC).read_text()))
