"""Entry point of a fine-tuning job: `python -m tandem.jobs.fine_tuning.driver JOB_DIR`.

Reads the job's files, writes the training config, and becomes the supervisor of a training job. A driver that is started again
goes on with what is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from tandem.config import to_dict
from tandem.data.index import DatasetIndex
from tandem.errors import TandemError
from tandem.jobs.fine_tuning.examples import build_examples, sizes_of
from tandem.jobs.fine_tuning.folder import read_spec
from tandem.jobs.fine_tuning.hyperparameters import choose, plan
from tandem.jobs.fine_tuning.recipe import training_config
from tandem.jobs.fine_tuning.spec import FineTuningSpec, Method
from tandem.observability.events import Failed, FineTuningPlanned
from tandem.observability.journal import Journal
from tandem.registry import find_base
from tandem.storage import write_atomic

SUPERVISOR = "tandem.train.supervision.supervisor"


def main(arguments: list[str]) -> int:  # noqa: RET503 - execv does not return
    """Prepare the job in the folder that the only argument names, and run it; returns only where it cannot be prepared."""
    if len(arguments) != 1:
        print("usage: python -m tandem.jobs.fine_tuning.driver JOB_DIR", file=sys.stderr)
        return 2
    job = Path(arguments[0]).expanduser().resolve()
    journal = Journal(job / "events.jsonl")
    if not (job / "config.yaml").exists():
        try:
            prepare(job, read_spec(job), journal)
        except TandemError as error:
            journal.write(Failed(error=str(error)))
            print(error, file=sys.stderr)
            return error.exit_code
    os.execv(sys.executable, [sys.executable, "-m", SUPERVISOR, str(job)])  # noqa: S606 - this very interpreter


def prepare(job: Path, spec: FineTuningSpec, journal: Journal) -> None:
    """Read the files of a job and write its training config. Raises TandemError for files that cannot be trained on."""
    base = find_base(spec.base)
    longest = min(spec.platform.sequence_length, base.max_length or spec.platform.sequence_length)
    method, data = Method(spec.method), job / "data"
    data.mkdir(exist_ok=True)

    def build(location: str, file_id: str, name: str) -> tuple[Path, DatasetIndex]:
        folder = data / name
        return folder, build_examples(location, file_id, folder, tokenizer=base.path, method=method)

    training, index = build(spec.training_location, spec.training_file, "training")
    validation = None
    if spec.validation_location is not None:
        validation, _ = build(spec.validation_location, str(spec.validation_file), "validation")
    sizes = sizes_of(index, training, base.path, longest=longest)
    chosen = choose(spec.hyperparameters, sizes.examples)
    planned = plan(chosen, examples=sizes.examples, rows=sizes.rows, workers=spec.platform.workers)
    config = training_config(spec, chosen, planned, sizes, data=training, validation=validation)
    journal.write(
        FineTuningPlanned(
            examples=sizes.examples,
            steps=planned.steps,
            n_epochs=chosen.n_epochs,
            batch_size=chosen.batch_size,
            learning_rate_multiplier=chosen.learning_rate_multiplier,
            beta=chosen.beta if method is Method.DPO else None,
        )
    )
    # Last: with it, the job is prepared.
    write_atomic(job / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
