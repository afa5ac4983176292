"""Execution of a prepared batch run by Ray Data on the connected cluster, one base model after another."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, DataContext

from tandem.batch.finish import finish, finished, rows_in
from tandem.batch.input.plan import WorkUnit, chunks_in_flight, left
from tandem.batch.input.read import ChunkSource
from tandem.batch.prepare import BatchRun
from tandem.batch.progress import Progress, Summary
from tandem.batch.reasons import explained
from tandem.batch.work import WorkerContext
from tandem.batch.worker import Worker
from tandem.cluster.capacity import check_nodes
from tandem.cluster.health.cordons import placeable_resources, placement_selector
from tandem.config import ServedModelConfig
from tandem.secret_values import without_references

READ_CPUS = 0
"""What Ray reserves for a task that reads: nothing, so that replicas that take every CPU cannot keep it from them."""
READERS = 2
"""Files that are read at a time: each engine has some in its window before it asks for more."""


def answer(run: BatchRun, tell: Callable[[Progress], None] = lambda progress: None) -> Summary:
    """Answer what is left, and write the two files. Raises EngineError if engines cannot start or keep on dying."""
    began, output, rows = time.monotonic(), run.output, run.survey.rows
    if (whole := finished(run)) is not None:
        return whole
    output.begin(run.manifest.plain())
    output.refuse(run.survey.refused)
    published = output.published()
    todo = left(run.units, published)
    earlier = rows_in(run, published)
    failed = len(run.survey.refused)
    done, tokens, prompt_tokens, answering_s = earlier + failed, 0, 0, 0.0
    tell(Progress(rows=rows, done=done, failed=failed, found=earlier))
    for number in range(len(run.bases)):
        before_s, first, last = answering_s, float("inf"), 0.0
        for told in _answers(run, number, [unit for unit in todo if unit.base == number]):
            done, failed = done + told["rows"], failed + told["failed"]
            tokens, prompt_tokens = tokens + told["tokens"], prompt_tokens + told["prompt_tokens"]
            first, last = min(first, told["began"]), max(last, told["ended"])
            answering_s = before_s + last - first
            tell(Progress(rows=rows, done=done, failed=failed, found=earlier, tokens=tokens, answering_s=answering_s))
    return replace(
        finish(run, found=earlier, began=began), tokens=tokens, prompt_tokens=prompt_tokens, answering_s=answering_s
    )


def _answers(run: BatchRun, number: int, todo: list[WorkUnit]) -> Iterator[dict[str, Any]]:
    """Have Ray Data read, answer and publish the units of a base; what the workers tell of each."""
    if not todo:
        return
    config, (spec, served) = run.config, run.bases[number]
    check_capacity(served)
    work = WorkerContext(
        spec=spec,
        served=served,
        default=run.names.default,
        targets=run.names.targets,
        request=config.request,
        output=run.output,
        window_rows=config.window_rows,
        chat=config.chat,
        check_values=run.manifest.checks_values,
    )
    run.output.clear_crashes()
    rows = max(1, sum(unit.chunk.rows for unit in todo) // len(todo))
    flight = chunks_in_flight(config.window_rows, rows, run.survey.size.bytes)
    size = min(served.replicas, len(todo))
    with DataContext.current(_context()):
        source = ChunkSource(run.survey.files, todo, work)
        with warnings.catch_warnings():
            # Ray Data has no other way to say `max_restarts`, and without it a row that kills its engine would do so for ever.
            warnings.simplefilter("ignore")
            read = ray.data.read_datasource(
                source,
                num_cpus=READ_CPUS,
                concurrency=min(READERS, len(source.tasks)),
                override_num_blocks=len(source.tasks),
            )
            told = _answered(read, work, served, flight, size=size, restarts=config.max_failures)
        try:
            for batch in told.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for i in range(len(batch["rows"])):
                    yield {key: values[i].item() for key, values in batch.items()}
        except ray.exceptions.RayError as error:
            raise explained(spec.name, error, run.output.crashes(), config.max_failures) from error


def _context() -> DataContext:
    """How Ray Data goes about it, here only."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A table is a unit and has one row: as one alone is too large, it is not put together with others.
    context.target_max_block_size = 1
    # A model that cannot be loaded is not tried again.
    context.max_consecutive_actor_init_deaths = 0
    # A thread for each chunk in flight that asks the kernel how large the process is.
    context.memory_usage_poll_interval_s = None
    # It logs with a traceback what it raises too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return context


def _answered(
    read: ray.data.Dataset, work: WorkerContext, served: ServedModelConfig, flight: int, *, size: int, restarts: int
) -> ray.data.Dataset:
    """The chunks handed to `size` workers, `flight` at a time to each."""
    return read.map_batches(
        Worker,
        fn_constructor_args=(work,),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=size,
            max_tasks_in_flight_per_actor=flight + 1,
            max_concurrent_calls_per_actor=flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=served.cpus_per_replica,
        num_gpus=served.gpus_per_replica or None,
        resources=dict(served.resources_per_replica) or None,
        runtime_env={"env_vars": without_references(served.env)} if served.env else None,
        max_restarts=restarts,
        label_selector=placement_selector() or None,
    )


def check_capacity(served: ServedModelConfig) -> None:
    """Refuse replicas that no node of the cluster, empty, could hold one of: Ray would wait for ever."""
    check_nodes(placeable_resources(), served)
