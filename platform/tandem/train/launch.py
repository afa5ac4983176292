"""The driver of a training job: `python -m tandem.train.launch JOB_DIR`, which is what a Ray job runs.

Reads the job's config, prepares data, runs the workers under Ray Train, writes and prints every event, draws the loss, and
registers the result. Run again on the same folder it goes on from the newest checkpoint, or ends at once if all is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from tandem.checkpoint import folders
from tandem.checkpoint.export import is_complete_export
from tandem.config import TrainConfig, check_elastic, load_yaml, to_dict, with_workers, worker_counts
from tandem.config.training.layout import ModelShape, check_layout
from tandem.data.heldout import hold_out_of_each, rows_of_each
from tandem.data.index import TOKENIZER_NAME, Part, check_tokenizers, find_dataset, find_parts, parts_digest
from tandem.data.packing import Rows
from tandem.data.stream import Stream, open_stream
from tandem.data.tokenize import TextEncoder
from tandem.errors import ClusterError, ConfigError, JobStopped, TandemError
from tandem.ids import digest
from tandem.observability import events
from tandem.observability.journal import Journal
from tandem.registry import BaseRef, Registry, find_base
from tandem.settings import export as export_variables
from tandem.settings import settings
from tandem.storage import check_writable, disk_errors
from tandem.train.parallel.deepspeed import check_deepspeed
from tandem.train.reporting.metrics import metrics_of
from tandem.train.reporting.plot import plot_run
from tandem.train.storage_retry import wait_for_storage
from tandem.train.supervision.attempts import WORKER_ENVIRONMENT, run_workers
from tandem.train.supervision.history import StopRequest
from tandem.train.supervision.supervisor import SUPERVISED_FLAG
from tandem.train.worker import WorkerTask


def main(arguments: list[str]) -> int:
    """Run the job in the folder named by the first argument; returns the exit status.

    A second one, `--supervised`, says that standard input ends with the supervisor.
    """
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], [SUPERVISED_FLAG]):
        print("usage: python -m tandem.train.launch JOB_DIR", file=sys.stderr)
        return 2
    job = Path(arguments[0]).expanduser().resolve()
    journal = Journal(job / "events.jsonl")
    stop_request = StopRequest()

    def stop(*_: object) -> None:
        # Workers first save what they have; without any the job unwinds at once, so that Ray ends with it.
        stop_request.set()
        if stop_request.overdue or not stop_request.training:
            sys.exit(JobStopped.exit_code)

    signal.signal(signal.SIGTERM, stop)
    if arguments[1:]:
        threading.Thread(target=_stop_with_supervisor, name="supervisor", daemon=True).start()
    try:
        with driver_lock(job, journal):
            run_job(job, journal, stop_request)
        return 0
    except SystemExit:
        if not stop_request:
            raise
        journal.write({"event": "stopped", "reason": "The job was told to stop. It goes on with the same command."})
        # Where Ray waits, it makes another status of ours.
        return JobStopped.exit_code
    except JobStopped as stopped:
        journal.write({"event": "stopped", "reason": str(stopped)})
        return stopped.exit_code
    except TandemError as error:
        return _failed(journal, str(error), error.exit_code)
    except Exception as error:
        logging.getLogger(__name__).exception("The job failed in a way that Tandem does not know.")
        return _failed(journal, f"{type(error).__name__}: {error}", 1)


def _stop_with_supervisor() -> None:
    # Nothing is ever written there: it ends when the supervisor does.
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def driver_lock(job: Path, journal: Journal) -> Iterator[None]:
    """Exclusive lock on driving the job; waits for another driver to end, such as one whose supervisor was killed."""
    with disk_errors("starting the job", job):
        file = (job / ".driver").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.write(
                {"event": "notice", "message": "Another driver of this job has not ended yet; this one waits."}
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks: then nobody is kept out.
            pass
        yield


def run_job(job: Path, journal: Journal, stop_request: StopRequest | None = None) -> None:
    """Do all that is left of a job. Raises a TandemError that says what to change, JobStopped once `stop_request` is set."""
    began = time.monotonic()
    config = load_yaml(TrainConfig, job / "config.yaml")
    before = journal.read()
    done = next((e for e in reversed(before) if e["event"] in ("finished", "started", "failed")), None)
    if done and done["event"] == "finished" and is_complete_export(job / "export"):
        if config.register and not done.get("model"):
            # A trial of a sweep that is wanted after all.
            done |= _register(config, job, _base(config), parts_digest(find_parts(config.data)), done)
        journal.write({k: v for k, v in done.items() if k != "time"})
        return
    check_deepspeed(config)
    parts = find_parts(config.data)
    for part in parts:
        config.check_kind(part.index.kind, str(part.folder))
    base = _base(config)
    check_elastic(config)
    for size in worker_counts(config):
        check_layout(base.shape() if base else ModelShape.of(config.model), with_workers(config, size))
    trained: tuple[Part, ...] = parts
    held: tuple[Part, ...] = ()
    if config.evaluation is not None and config.evaluation.share:
        trained, held = hold_out_of_each(parts, config.evaluation.share)
    tokenizer = _tokenizer(config, base, parts)
    encoder = TextEncoder(str(tokenizer))
    reference = find_reference_model(config, base, encoder)
    root = folders.checkpoints_root(config.checkpoint, job)
    # Before a folder is made where the one with the checkpoints is missing.
    wait_for_storage(root, journal, config.faults.storage_retry_s)
    check_writable(root)
    connect(config)
    # Raises before a worker starts if nothing in the data can be learned from.
    stream = open_stream(trained, encoder, config.data, workers=config.parallel.data, seed=config.seed)
    rows = _evaluation_rows(config, stream, held)
    task = WorkerTask(
        config=config,
        job=job,
        base=base.path if base else None,
        base_id=base.id if base else None,
        reference=reference,
        tokenizer=tokenizer,
        stream=stream,
        evaluation=None if rows is None else ray.put(rows),
    )
    where: dict[str, Any] = {}

    def register(end: dict[str, Any]) -> None:
        """Into the registry as soon as the files are whole; what goes wrong is told when the run has ended, by a second try."""
        if config.register:
            with contextlib.suppress(TandemError, OSError):
                where.update(_register(config, job, base, parts_digest(parts), end | _evaluated(journal)))

    with metrics_of(
        config, job, before=before, notice=lambda said: journal.write({"event": "notice", "message": said})
    ) as metrics:
        end = run_workers(task, journal, metrics, stop_request, exported=register)
    end |= _evaluated(journal)
    if not where:
        where = {"model": None, "base": None, "path": str(job / "export")}
        if config.register:
            where = _register(config, job, base, parts_digest(parts), end)
    plot_run(journal.read(), job / "loss.png", title=config.name)
    journal.write(
        {
            "event": "finished", **where, "plot": str(job / "loss.png"), "loss": end.get("loss"),
            "evaluation": end["evaluation"], "tokens": end.get("tokens"),
            "steps": config.steps, "seconds": round(time.monotonic() - began, 3),
        }
    )  # fmt: skip


def _evaluated(journal: Journal) -> dict[str, Any]:
    """What the last evaluation measured."""
    found = (measured(e) for e in reversed(journal.read()) if e["event"] == "evaluation")
    return {"evaluation": next(found, None)}


def measured(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an `evaluation` event that were measured."""
    about = ("event", "time", "step", "rows", "averaged")
    return {name: value for name, value in evaluation.items() if name not in about}


def connect(config: TrainConfig) -> None:
    """Join the cluster (the job's own, RAY_ADDRESS, or a new local one); ClusterError if it can never hold the workers."""
    # The driver itself looks for nodes that will be taken away (train/supervision/capacity.py): Ray's own watcher would be one
    # more process.
    export_variables(
        {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
    )
    if not ray.is_initialized():
        parallel = config.parallel
        address = settings().ray_address
        local: dict[str, Any] = (
            {} if address else {"num_cpus": max(8, int(parallel.workers * parallel.cpus_per_worker) + 2)}
        )
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=address or "local",
                logging_level=logging.WARNING,
                runtime_env={"env_vars": dict(WORKER_ENVIRONMENT)},
                include_dashboard=None if address else False,
                **local,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"No Ray cluster answers at {address}: {error}. Start one, or unset RAY_ADDRESS."
            ) from error
        if callable(handler):
            # Ray has set its own, which ends the process without a word.
            signal.signal(signal.SIGTERM, handler)
    check_capacity(config, ray.cluster_resources())


def check_capacity(config: TrainConfig, total: dict[str, float]) -> None:
    """Refuse a request that the whole cluster, empty, could not hold: Ray would wait for ever."""
    parallel, least = config.parallel, worker_counts(config)[0]
    # Reading the data needs room beside the workers.
    for name, each, spare in (
        ("CPU", parallel.cpus_per_worker, config.data.readers),
        ("GPU", parallel.gpus_per_worker, 0.0),
        *((name, each, 0.0) for name, each in parallel.resources_per_worker.items()),
    ):
        needed, there = least * each + spare, total.get(name, 0.0)
        if each and needed > there:
            beside = f", and {spare:g} to read the data" if spare else ""
            setting = f"{name.lower()}s_per_worker" if name in ("CPU", "GPU") else f"resources_per_worker.{name}"
            raise ClusterError(
                f"{least} workers of {each:g} {name} each{beside} need {needed:g} {name}; the whole cluster has "
                f"{there:g}. Lower parallel.workers or parallel.{setting}, or add a node."
            )


def _evaluation_rows(config: TrainConfig, stream: Stream, held: tuple[Part, ...]) -> Rows | None:
    if config.evaluation is None:
        return None
    if config.evaluation.data is not None:
        folder, index = find_dataset(config.evaluation.data)
        config.check_kind(index.kind, str(folder))
        held = (Part(folder=folder, index=index),)
    return rows_of_each(held, stream.sources[0].spec, config.evaluation.rows)


def find_reference_model(config: TrainConfig, base: BaseRef | None, encoder: TextEncoder) -> Path | None:
    """The folder of the model that dpo compares with; None without dpo, or if that is the base of the job's adapters.

    Raises ConfigError if its tokenizer is not that of the base.
    """
    if config.objective != "dpo" or base is None:
        return None
    if config.dpo is None or config.dpo.reference is None:
        # Adapters are compared with the model that they adapt, which is there already.
        return base.path if config.lora is None else None
    found = find_base(config.dpo.reference, "dpo.reference")
    ours, theirs = encoder.tokenizer.get_vocab(), TextEncoder(str(found.path)).tokenizer.get_vocab()
    if ours != theirs:
        raise ConfigError(
            f"dpo.reference ({found.id}) has another tokenizer than model.base ({base.id}): {len(theirs)} tokens, of which "
            f"{len(ours.items() & theirs.items())} are among the base's {len(ours)}, so their answers cannot be compared. "
            "Name a model that comes from the same base, or unset dpo.reference."
        )
    return found.path


def _tokenizer(config: TrainConfig, base: BaseRef | None, parts: tuple[Part, ...]) -> Path:
    if base is not None:
        return base.path
    if config.model.tokenizer is not None:
        return Path(config.model.tokenizer).expanduser().resolve()
    check_tokenizers(parts)
    return parts[0].folder / TOKENIZER_NAME


def _base(config: TrainConfig) -> BaseRef | None:
    return find_base(config.model.base) if config.model.base else None


def _register(
    config: TrainConfig, job: Path, base: BaseRef | None, dataset: str, end: Mapping[str, Any]
) -> dict[str, Any]:
    """Put the result into the registry, with loss and evaluation of the `end`; returns what the `finished` event says of it."""
    registry, folder = Registry.open(), job / "export"
    lineage = {
        "job": job.name,
        "dataset": dataset,
        "config": digest(to_dict(config)),
        "steps": config.steps,
        "loss": end.get("loss"),
        "evaluation": end.get("evaluation"),
    }
    if base is not None and base.record and base.record.commit:
        lineage["base_commit"] = f"{base.record.lineage['hub']} {base.record.commit}"
    if base is not None and config.lora is None:
        lineage["base"] = base.id  # of an adapter it is a column of its own
    if config.lora is None:
        record = registry.register_model(config.name, folder, lineage=lineage)
    else:
        assert base is not None, "TrainConfig refuses lora without a base"
        adapted = base.id
        if not base.record:
            adapted = registry.register_model(base.path.name, base.path, lineage={"source": "given as a folder"}).id
        record = registry.register_adapter(config.name, folder, base=adapted, lineage=lineage)
    return {"model": record.id, "base": record.base, "path": str(record.path)} | ({"dora": True} if record.dora else {})


def _failed(journal: Journal, message: str, exit_code: int) -> int:
    event = {"event": "failed", "error": message}
    try:
        journal.write(event)
    except (TandemError, OSError):
        # Where the journal cannot be written, the log still tells.
        print(events.encode(event), flush=True)
    return exit_code


if __name__ == "__main__":
    # Under its own name, so that what workers unpickle is found in a module they can import.
    from tandem.train.launch import main as named_main

    sys.exit(named_main(sys.argv[1:]))
