"""Batch worker: a Ray actor with one engine that answers several chunks at a time and publishes each.

What it hands back to Ray Data is only how many rows it has answered. A chunk comes again when the actor died before it could say
so: what is published by then is not asked again.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from tandem.batch.answer import EngineClient, EngineDiedError, EngineRequest
from tandem.batch.input.rows import RowRequest, request_bytes
from tandem.batch.output.lines import Line, answered, failed, reason_of
from tandem.batch.work import WorkerContext
from tandem.cluster.reaper import Reaper
from tandem.engine.create import create_engine
from tandem.engine.descriptor import Requests, UnsupportedRequestError
from tandem.engine.engines import find_engine
from tandem.errors import EngineError, StorageError
from tandem.secret_values import resolve_references
from tandem.serve.replica.adapter_checks import AdapterChecker
from tandem.serve.replica.start_log import StartLog

TOLD = ("rows", "failed", "prompt_tokens", "tokens", "began", "ended")
"""What is said of each chunk: counts, and when (seconds since 1970) it was begun and published."""


class Worker:
    """One engine. Ray Data calls it in several threads at a time."""

    def __init__(self, work: WorkerContext) -> None:
        """Load the model; raises ConfigError or EngineError with the reason if that cannot work."""
        self._work = work
        if not work.output.is_begun():
            node = socket.gethostname()
            raise EngineError(
                f"{work.output.run} is not on the node {node}, so what it answers would not be found. Give an output in a folder "
                "that all nodes share, or s3://..."
            )
        self._reaper = Reaper.of_children()
        spec, engine = work.spec, find_engine(work.spec.kind)
        self._rules = engine.requests
        self._tools = engine.model_features(Path(spec.path), spec.args).tools
        secrets = resolve_references(work.served.env, "env")
        log = StartLog(f"batch-{spec.name.replace('/', '~')}", engine, secrets)
        self._client = EngineClient(
            create_engine(spec),
            window_rows=work.window_rows,
            max_adapters=spec.max_adapters,
            max_cached=spec.max_cached_adapters,
            prepare=AdapterChecker(Path(spec.path) if spec.path else None, spec.max_lora_rank),
        )
        try:
            self._client.start()
        except EngineError as error:
            raise log.with_engine_output(error) from None

    def __call__(self, table: Any) -> dict[str, Any]:
        """Answer a table of one or more units (read.COLUMNS), and publish each."""
        told: dict[str, list[Any]] = {key: [] for key in TOLD}
        units = zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
        for name, *columns in units:
            began, chunk = time.time(), list(zip(*columns, strict=True))
            lines: list[Line] = []
            if not self._work.output.is_published(name):
                lines = self._answer(chunk)
                self._work.output.publish(name, [line.text for line in lines])
            sums = [
                sum(getattr(line, key) for line in lines) for key in ("failed", "prompt_tokens", "completion_tokens")
            ]
            for key, value in zip(TOLD, (len(chunk), *sums, began, time.time()), strict=True):
                told[key].append(value)
        return {key: np.asarray(values) for key, values in told.items()}

    def _answer(self, rows: list[tuple[int, str, bytes]]) -> list[Line]:
        """The lines of a chunk's rows, in their order."""
        lines: dict[int, Line] = {}
        asked: list[tuple[int, str, bytes, RowRequest]] = []
        requests = []
        for number, where, raw in rows:
            ask, target = self._work.ask(raw)
            try:
                self._rules.check(target.engine_name, ask.body, self._work.served, self._tools)
            except UnsupportedRequestError as error:
                lines[number] = failed(number, where, str(error), raw)
                continue
            asked.append((number, where, raw, ask))
            requests.append(EngineRequest(ask.path, request_bytes(ask, target.engine_name), target.adapter))
        try:
            answers = self._client.answer(requests)
        except* EngineDiedError as died:
            self._end(str(died.exceptions[0]))
        except* StorageError as away:
            raise away.exceptions[0] from None
        for (number, where, raw, ask), (status, body) in zip(asked, answers, strict=True):
            lines[number] = line_of(number, where, raw, ask, status, body, self._rules)
        return [lines[number] for number in sorted(lines)]

    def _end(self, reason: str) -> None:
        """End this process, so that Ray starts another and hands it what was not published."""
        self._work.output.record_crash(reason)
        os._exit(1)


def line_of(number: int, where: str, raw: bytes, ask: RowRequest, status: int, body: bytes, rules: Requests) -> Line:
    """The line of a row that an engine has answered or refused; `rules` explain its errors."""
    if status != 200:
        return failed(number, where, reason_of(body, ask.path, rules.explain_error), raw, status=status)
    try:
        return answered(number, ask.custom_id, status, body, plain=ask.plain)
    except ValueError as error:
        said = (
            f"Its answer, {len(body)} bytes, is no JSON object ({error}). Ask for one: encoding_format float or base64."
        )
        return failed(number, where, said, raw, status=422)
