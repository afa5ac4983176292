"""Driver of a training job: `python -m tandem.train.launch JOB_DIR`, run under `train.supervision.supervisor` in a Ray job.

It reads the job's config, prepares the data, runs the workers under Ray Train, writes and prints events, plots the loss, and
registers the result. Run again on the same folder, it continues from the newest checkpoint, or ends at once if the job is done.
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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from tandem.checkpoint import folders
from tandem.cluster.health.cordons import placeable_resources, total
from tandem.cluster.shared_files import check_same_files
from tandem.config import TrainConfig, check_elastic, load_yaml, with_at_most, with_workers, worker_counts
from tandem.config.training.layout import ModelShape, check_layout
from tandem.data.heldout import hold_out_of_each, rows_of_each
from tandem.data.index import TOKENIZER_NAME, Part, check_tokenizers, find_dataset, find_parts, parts_digest
from tandem.data.packing import Rows
from tandem.data.stream import Stream, open_stream
from tandem.data.tokenize import TextEncoder
from tandem.errors import ClusterError, ConfigError, JobStopped, TandemError
from tandem.observability import codec
from tandem.observability.events import Event, Exported, Failed, Finished, Started, Stopped
from tandem.observability.journal import Journal
from tandem.registry import BaseRef, find_base
from tandem.settings import export as export_variables
from tandem.settings import settings
from tandem.storage import check_writable, disk_errors, located
from tandem.train.registration import Origin, RegisteredResult, ResultRegistration, job_base, last_evaluation
from tandem.train.reporting.metrics import metrics_of
from tandem.train.reporting.plot import plot_run
from tandem.train.storage_retry import wait_for_storage
from tandem.train.supervision.attempts import WORKER_ENVIRONMENT, run_workers
from tandem.train.supervision.stop_request import StopRequest
from tandem.train.supervision.supervisor import SUPERVISED_FLAG
from tandem.train.task import WorkerTask


def main(arguments: list[str]) -> int:
    """Run the job in the folder that the first argument names; returns the exit status.

    With `--supervised` as the second argument, standard input is a pipe that closes when the supervisor ends.
    """
    if len(arguments) not in (1, 2) or arguments[1:] not in ([], [SUPERVISED_FLAG]):
        print("usage: python -m tandem.train.launch JOB_DIR", file=sys.stderr)
        return 2
    job = Path(arguments[0]).expanduser().resolve()
    journal = Journal(job / "events.jsonl")
    stop_request = StopRequest()

    def stop(*_: object) -> None:
        # Workers save a checkpoint first. Without workers the main thread exits at once, so that Ray ends with it.
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
        journal.write(Stopped(reason="The job was told to stop. The same command resumes it."))
        # Ray turns the exit status into another one where it waits.
        return JobStopped.exit_code
    except JobStopped as stopped:
        journal.write(Stopped(reason=str(stopped)))
        return stopped.exit_code
    except TandemError as error:
        return _record_failure(journal, str(error), error.exit_code)
    except Exception as error:
        logging.getLogger(__name__).exception("The job failed with an unexpected error.")
        return _record_failure(journal, f"{type(error).__name__}: {error}", 1)


def _stop_with_supervisor() -> None:
    # Nothing is ever written to the pipe: it closes when the supervisor ends.
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
            journal.notice("Another driver of this job has not ended yet; this one waits.")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks: nothing keeps a second driver out.
            pass
        yield


def run_job(job: Path, journal: Journal, stop_request: StopRequest | None = None) -> None:
    """Run the job in `job` to its end. Raises a TandemError that says what to change, JobStopped after `stop_request`."""
    start_time = time.monotonic()
    config = with_at_most(load_yaml(TrainConfig, job / "config.yaml"), settings().max_workers)
    earlier_events = journal.read()
    registration = ResultRegistration(config, job, journal)
    if (finished := _finished_event(earlier_events, job)) is not None:
        journal.write(_register_late(finished, registration) if config.register and not finished.model else finished)
        return
    task, registration.origin = _prepare(config, job, journal)
    with metrics_of(config, job, earlier_events=earlier_events, notice=journal.notice) as metrics:
        exported = run_workers(
            task,
            journal,
            metrics,
            stop_request,
            on_exported=registration.on_exported,
            on_checkpoint_exported=registration.on_checkpoint_exported,
        )
    result = registration.finish(exported)
    plot_run(journal.read(), job / "loss.png", title=config.name)
    journal.write(
        _with_result(
            Finished(
                plot=str(job / "loss.png"),
                loss=exported.loss,
                evaluation=last_evaluation(journal),
                tokens=exported.tokens,
                steps=config.steps,
                seconds=round(time.monotonic() - start_time, 3),
            ),
            result,
        )
    )


def _finished_event(events: list[Event], job: Path) -> Finished | None:
    """The event of the end of a job that is done: its result is exported, and it has not started again since."""
    boundary_events = (event for event in reversed(events) if isinstance(event, Finished | Started | Failed))
    last_event = next(boundary_events, None)
    return (
        replace(last_event, time=None)
        if isinstance(last_event, Finished) and folders.is_complete_export(job / "export")
        else None
    )


def _register_late(finished: Finished, registration: ResultRegistration) -> Finished:
    """Register a result that was exported without being registered, such as that of a sweep's trial."""
    return _with_result(
        finished,
        registration.finish(Exported(step=finished.steps or 0, loss=finished.loss, tokens=finished.tokens or 0)),
    )


def _with_result(finished: Finished, result: RegisteredResult) -> Finished:
    return replace(finished, model=result.model, base=result.base, path=result.path, dora=result.dora)


def _prepare(config: TrainConfig, job: Path, journal: Journal) -> tuple[WorkerTask, Origin]:
    """Check the config against data, model and cluster, and open the data: the workers' input, and the result's parents."""
    if config.parallel.strategy == "deepspeed":
        from tandem.train.parallel.deepspeed import check_deepspeed

        check_deepspeed(config)
    parts = find_parts(config.data)
    for part in parts:
        config.check_kind(part.index.kind, str(part.location))
    base = job_base(config)
    check_elastic(config)
    for count in worker_counts(config):
        check_layout(base.shape() if base else ModelShape.of(config.model), with_workers(config, count))
    split = _split_held_out(config, parts)
    tokenizer = _tokenizer(config, base, parts)
    encoder = TextEncoder(str(tokenizer))
    reference = find_reference_model(config, base, encoder)
    root = folders.checkpoints_root(config.checkpoint, job)
    # Before `check_writable` makes the folder: a missing one may be storage that is away.
    wait_for_storage(root, journal, config.faults.storage_retry_s)
    check_writable(root)
    if config.export_to is not None:
        check_writable(located(config.export_to))
    connect(config)
    # Raises before a worker starts if the data has no row with loss.
    stream = open_stream(split.training, encoder, config.data, workers=config.parallel.data, seed=config.seed)
    rows = _evaluation_rows(config, stream, split.held_out)
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
    return task, Origin(base, parts_digest(parts))


@dataclass(frozen=True)
class _Split:
    """Shards to train on, and shards to evaluate on."""

    training: tuple[Part, ...]
    held_out: tuple[Part, ...]


def _split_held_out(config: TrainConfig, parts: tuple[Part, ...]) -> _Split:
    if config.evaluation is None or not config.evaluation.share:
        return _Split(parts, ())
    return _Split(*hold_out_of_each(parts, config.evaluation.share))


def connect(config: TrainConfig) -> None:
    """Connect to the cluster (the job's own, RAY_ADDRESS, or a new local one); ClusterError if the workers can never fit."""
    # The driver itself watches for draining nodes (train/supervision/capacity.py): Ray's watcher would be one more process.
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
            # Ray installs a handler that ends the process without an event.
            signal.signal(signal.SIGTERM, handler)
    check_capacity(config, total(placeable_resources()))
    check_same_files(settings().root)


def check_capacity(config: TrainConfig, cluster_resources: dict[str, float]) -> None:
    """Raise ClusterError if the empty cluster could not hold the workers: Ray would wait for ever."""
    parallel, min_workers = config.parallel, worker_counts(config)[0]
    # The tasks that read the data need CPUs beside the workers.
    for name, per_worker, for_readers in (
        ("CPU", parallel.cpus_per_worker, config.data.readers),
        ("GPU", parallel.gpus_per_worker, 0.0),
        *((name, per_worker, 0.0) for name, per_worker in parallel.resources_per_worker.items()),
    ):
        required, available = min_workers * per_worker + for_readers, cluster_resources.get(name, 0.0)
        if per_worker and required > available:
            readers_note = f", and {for_readers:g} to read the data" if for_readers else ""
            setting = f"{name.lower()}s_per_worker" if name in ("CPU", "GPU") else f"resources_per_worker.{name}"
            raise ClusterError(
                f"{min_workers} workers of {per_worker:g} {name} each{readers_note} need {required:g} {name}; "
                f"the whole cluster has {available:g}. Lower parallel.workers or parallel.{setting}, or add a node."
            )


def _evaluation_rows(config: TrainConfig, stream: Stream, held_out: tuple[Part, ...]) -> Rows | None:
    if config.evaluation is None:
        return None
    if config.evaluation.data is not None:
        found = find_dataset(config.evaluation.data)
        config.check_kind(found.index.kind, str(found.location))
        held_out = (found,)
    return rows_of_each(held_out, stream.sources[0].spec, config.evaluation.rows)


def find_reference_model(config: TrainConfig, base: BaseRef | None, encoder: TextEncoder) -> Path | None:
    """The folder of DPO's reference model; None without DPO, or if it is the base of the job's adapters.

    Raises ConfigError if its tokenizer is not that of the base.
    """
    if config.objective != "dpo" or base is None:
        return None
    if config.dpo is None or config.dpo.reference is None:
        # Adapters are compared with their own base, which is loaded already.
        return base.path if config.lora is None else None
    reference = find_base(config.dpo.reference, "dpo.reference")
    base_vocab, reference_vocab = encoder.tokenizer.get_vocab(), TextEncoder(str(reference.path)).tokenizer.get_vocab()
    if base_vocab != reference_vocab:
        raise ConfigError(
            f"dpo.reference ({reference.id}) has another tokenizer than model.base ({base.id}): "
            f"{len(reference_vocab)} tokens, of which {len(base_vocab.items() & reference_vocab.items())} are among the base's "
            f"{len(base_vocab)}, so their answers cannot be compared. "
            "Name a model that comes from the same base, or unset dpo.reference."
        )
    return reference.path


def _tokenizer(config: TrainConfig, base: BaseRef | None, parts: tuple[Part, ...]) -> Path:
    if base is not None:
        return base.path
    if config.model.tokenizer is not None:
        return Path(config.model.tokenizer).expanduser().resolve()
    check_tokenizers(parts)
    return parts[0].folder / TOKENIZER_NAME


def _record_failure(journal: Journal, message: str, exit_code: int) -> int:
    event = Failed(error=message)
    try:
        journal.write(event)
    except (TandemError, OSError):
        # The log still gets the event if the journal cannot be written.
        print(codec.encode(event), flush=True)
    return exit_code


if __name__ == "__main__":
    # Imported by name: workers unpickle objects of this module, and cannot import __main__.
    from tandem.train.launch import main as named_main

    sys.exit(named_main(sys.argv[1:]))
