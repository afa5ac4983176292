"""The driver of a training job: `python -m tandem.train.launch JOB_DIR`, which is what a Ray job runs.

Reads the job's config, prepares data, runs the workers under Ray Train, writes and prints every event, draws the loss, and
registers the result. Run again on the same folder it goes on from the newest checkpoint, or ends at once if all is done.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import ray.train.v2.api.callback as train_callbacks
from ray.train.v2.api.config import FailureConfig, RunConfig

from tandem import errors
from tandem.checkpoint import folders
from tandem.checkpoint.export import is_whole
from tandem.config import TrainConfig, load_yaml, to_dict
from tandem.config.layout import ModelShape, check_layout
from tandem.data.heldout import hold_out_of_each, rows_of_each
from tandem.data.index import TOKENIZER_NAME, Part, check_tokenizers, find_dataset, find_parts, parts_digest
from tandem.data.packing import Rows
from tandem.data.stream import Stream, open_stream
from tandem.data.tokenize import TextEncoder
from tandem.errors import ClusterError, ConfigError, TandemError
from tandem.ids import digest
from tandem.observability import events
from tandem.observability.journal import Journal
from tandem.registry import BaseRef, Registry, find_base
from tandem.settings import export as export_variables
from tandem.settings import settings
from tandem.storage import check_writable
from tandem.train.deepspeed import check_deepspeed
from tandem.train.mailbox import open_mailbox
from tandem.train.metrics import Metrics, metrics_of
from tandem.train.plot import plot_run
from tandem.train.worker import WorkerTask, run_worker

WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""One intra-op thread a process: oversubscribed threads were 3 to 14 times slower (facts.md)."""


def main(arguments: list[str]) -> int:
    """Run the job in the folder named by the only argument; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m tandem.train.launch JOB_DIR", file=sys.stderr)
        return 2
    job = Path(arguments[0]).expanduser().resolve()
    journal = Journal(job / "events.jsonl")
    # A stopped job unwinds, so that Ray and the workers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_job(job, journal)
        return 0
    except TandemError as error:
        return _failed(journal, str(error), error.exit_code)
    except Exception as error:
        logging.getLogger(__name__).exception("The job failed in a way that Tandem does not know.")
        return _failed(journal, f"{type(error).__name__}: {error}", 1)


def run_job(job: Path, journal: Journal) -> None:
    """Do all that is left of a job. Raises a TandemError that says what to change."""
    began = time.monotonic()
    config = load_yaml(TrainConfig, job / "config.yaml")
    before = journal.read()
    done = next((e for e in reversed(before) if e["event"] in ("finished", "started", "failed")), None)
    if done and done["event"] == "finished" and is_whole(job / "export"):
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
    check_layout(base.shape() if base else ModelShape.of(config.model), config)
    trained: tuple[Part, ...] = parts
    held: tuple[Part, ...] = ()
    if config.evaluation is not None and config.evaluation.share:
        trained, held = hold_out_of_each(parts, config.evaluation.share)
    tokenizer = _tokenizer(config, base, parts)
    encoder = TextEncoder(str(tokenizer))
    reference = reference_model(config, base, encoder)
    check_writable(folders.root_of(config.checkpoint, job))
    connect(config)
    # Raises before a worker starts if nothing in the data can be learned from.
    stream = open_stream(trained, encoder, config.data, workers=config.parallel.data, seed=config.seed)
    rows = _evaluation_rows(config, stream, held)
    mailbox = open_mailbox()
    task = WorkerTask(
        config=config,
        job=job,
        base=base.path if base else None,
        base_id=base.id if base else None,
        reference=reference,
        tokenizer=tokenizer,
        stream=stream,
        evaluation=None if rows is None else ray.put(rows),
        mailbox=mailbox,
    )
    with metrics_of(
        config, job, before=before, notice=lambda said: journal.write({"event": "notice", "message": said})
    ) as metrics:
        end = _run_workers(task, journal, metrics)
    told = journal.read()
    plot_run(told, job / "loss.png", title=config.name)
    end["evaluation"] = next((measured(e) for e in reversed(told) if e["event"] == "evaluation"), None)
    where = {"model": None, "base": None, "path": str(job / "export")}
    if config.register:
        where = _register(config, job, base, parts_digest(parts), end)
    journal.write(
        {
            "event": "finished", **where, "plot": str(job / "loss.png"), "loss": end.get("loss"),
            "evaluation": end["evaluation"], "tokens": end.get("tokens"),
            "steps": config.steps, "seconds": round(time.monotonic() - began, 3),
        }
    )  # fmt: skip


def worker_environment(config: TrainConfig) -> dict[str, str]:
    """Variables of a job's workers."""
    # Where DeepSpeed is installed transformers imports it, and it would look for devices, and warn of finding none.
    return {**WORKER_ENVIRONMENT, "DS_ACCELERATOR": "cuda" if config.parallel.gpus_per_worker else "cpu"}


def measured(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an `evaluation` event that were measured."""
    about = ("event", "time", "step", "rows", "averaged")
    return {name: value for name, value in evaluation.items() if name not in about}


def connect(config: TrainConfig) -> None:
    """Join the cluster (the job's own, RAY_ADDRESS, or a new local one); ClusterError if it can never hold the workers."""
    export_variables({"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_V2_ENABLED": "1"})
    if not ray.is_initialized():
        parallel = config.parallel
        address = settings().ray_address
        local: dict[str, Any] = (
            {} if address else {"num_cpus": max(8, int(parallel.workers * parallel.cpus_per_worker) + 2)}
        )
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
    check_room(config, ray.cluster_resources())


def check_room(config: TrainConfig, total: dict[str, float]) -> None:
    """Refuse a request that the whole cluster, empty, could not hold: Ray would wait for ever."""
    parallel = config.parallel
    # Reading the data needs room beside the workers.
    for name, each, spare in (
        ("CPU", parallel.cpus_per_worker, config.data.readers),
        ("GPU", parallel.gpus_per_worker, 0.0),
    ):
        needed, there = parallel.workers * each + spare, total.get(name, 0.0)
        if each and needed > there:
            beside = f", and {spare:g} to read the data" if spare else ""
            raise ClusterError(
                f"{parallel.workers} workers of {each:g} {name} each{beside} need {needed:g} {name}; the whole cluster has "
                f"{there:g}. Lower parallel.workers or parallel.{name.lower()}s_per_worker, or add a node."
            )


def _evaluation_rows(config: TrainConfig, stream: Stream, held: tuple[Part, ...]) -> Rows | None:
    if config.evaluation is None:
        return None
    if config.evaluation.data is not None:
        folder, index = find_dataset(config.evaluation.data)
        config.check_kind(index.kind, str(folder))
        held = (Part(folder=folder, index=index),)
    return rows_of_each(held, stream.sources[0].spec, config.evaluation.rows)


def reference_model(config: TrainConfig, base: BaseRef | None, encoder: TextEncoder) -> Path | None:
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
    if config.lora is None:
        record = registry.register_model(config.name, folder, lineage=lineage)
    else:
        assert base is not None, "TrainConfig refuses lora without a base"
        adapted = base.id
        if not base.record:
            adapted = registry.register_model(base.path.name, base.path, lineage={"source": "given as a folder"}).id
        record = registry.register_adapter(config.name, folder, base=adapted, lineage=lineage)
    return {"model": record.id, "base": record.base, "path": str(record.path)} | ({"dora": True} if record.dora else {})


def _run_workers(task: WorkerTask, journal: Journal, metrics: Metrics) -> dict[str, Any]:
    """Run Ray Train to its end; returns the workers' last event. Raises what they failed with."""
    config = task.config
    reasons: list[str] = []
    end: dict[str, Any] = {}
    with _pump(task, journal, metrics, end):
        storage = task.job / ".ray"
        trainer = ray.train.torch.TorchTrainer(
            run_worker,
            train_loop_config={"task": task},
            torch_config=ray.train.torch.TorchConfig(backend="nccl" if config.parallel.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.parallel.workers,
                # As few nodes as can be; Ray numbers the ranks of a node in a row, which is how tensor groups are cut.
                placement_strategy="PACK",
                use_gpu=config.parallel.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": config.parallel.cpus_per_worker,
                    **({"GPU": config.parallel.gpus_per_worker} if config.parallel.gpus_per_worker else {}),
                },
            ),
            run_config=RunConfig(  # type: ignore[arg-type]
                # Our own checkpoints say where to go on; Ray's record of a run that died must not.
                name=uuid.uuid4().hex[:8],
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
                callbacks=[FailureReporter(task.mailbox)],
                worker_runtime_env={"env_vars": worker_environment(config)},
            ),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            reasons.append(str(error))
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        fault = ray.get(task.mailbox.failed.remote())
    if fault is not None:
        kind, message, _ = fault
        raise getattr(errors, kind, errors.JobError)(message)
    if reasons:
        newest = folders.latest(folders.root_of(config.checkpoint, task.job))
        where = f"step {folders.read_state(newest).step}" if newest else "the start"
        raise errors.JobError(
            f"Training failed {config.checkpoint.max_failures + 1} times, the last time with: {_last_line(reasons[0])} "
            f"Run the same command again to go on from {where}."
        )
    if not end:
        raise errors.JobError("Training ended without an export. Run the same command again.")
    return end


@contextlib.contextmanager
def _pump(task: WorkerTask, journal: Journal, metrics: Metrics, end: dict[str, Any]) -> Iterator[None]:
    """Write events as they come, until the block ends and the mailbox is empty."""
    over = threading.Event()
    problems: list[Exception] = []
    attempts = 0
    reason = "a worker ended"

    def handle(event: dict[str, Any]) -> None:
        nonlocal attempts, reason
        match event["event"]:
            case "fault":
                reason = event["reason"]
            case "exported":
                end.update(event)
            case "started" if attempts:
                journal.write({"event": "restart", "reason": reason, "resumed_from": event["resumed_from"]})
            case _:
                attempts += event["event"] == "started"
                journal.write(event)
                metrics.write(event)

    def run() -> None:
        try:
            while True:
                last = over.is_set()
                for event in ray.get(task.mailbox.take.remote(0.05 if last else 0.5)):
                    handle(event)
                if last:
                    return
        except Exception as error:  # noqa: BLE001 - raised again by the main thread
            problems.append(error)
            # The workers' next look at the mailbox tells them; what is trained so far stays.
            with contextlib.suppress(Exception):
                ray.get(task.mailbox.fail.remote(type(error).__name__, str(error), 1))

    thread = threading.Thread(target=run, name="events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if problems:
        raise problems[0]


class FailureReporter(train_callbacks.UserCallback):
    """Tells the mailbox why workers failed; runs in Ray Train's controller."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Note the first failure, before the workers start again."""
        # The rank that lost a peer says so too; the one that died says why.
        died = [r for r, e in worker_exceptions.items() if "Actor" in type(e).__name__ or "Died" in type(e).__name__]
        rank = next(iter(died), min(worker_exceptions, default=0))
        text = _last_line(str(worker_exceptions.get(rank, "")))
        self._mailbox.put.remote({"event": "fault", "reason": f"worker {rank}: {text}"})


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"


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
