"""A job's events: one JSON object a line, marked so that they can be picked out of a log that holds other things too.

| event      | fields                                                                                            |
|------------|---------------------------------------------------------------------------------------------------|
| started    | job, kind, workers, nodes, layout, parameters, trainable, steps, resumed_from (step or null)      |
| step       | step, steps, loss, grad_norm, learning_rate, tokens_per_s, tokens, seconds, metrics (by name),     |
|            | mfu (0 to 1), memory_bytes (peak of rank 0: of its GPU, or of its process)                        |
| evaluation | step, rows, averaged (the weights were), loss, and perplexity, or what else the objective reports |
| checkpoint | step, path                                                                                        |
| fault      | kind (worker, node, hang, controller, driver), rank (or null), reason, step (the last one told)   |
| hang       | ranks, reason, stacks (by rank: the Python stack of each that is stuck, and where the others wait) |
| slow       | rank, node, reason                                                                                |
| skipped    | step, first, rows, suspects, in_a_row, reason (a step that was not finite)                        |
| rollback   | from, step (back to this), rows (first, and the one after the last, that are left out), loss, median, reason |
| resized    | from, to (workers), layout, reason, step                                                          |
| restart    | reason, resumed_from, workers, repeated (steps), lost_s                                           |
| stopped    | reason (the job was told to stop, and can go on)                                                  |
| notice     | message (something that a person should know, and that ends nothing)                              |
| finished   | model (the registered id, or null), base (of an adapter), path, plot, loss, evaluation (the last, |
|            | or null), tokens, steps, seconds, dora (true: an adapter to be merged before it is served)        |
| failed     | error                                                                                             |

A sweep's events are in `tandem.jobs.sweep`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MARK = "@tandem "


def encode(event: dict[str, Any]) -> str:
    """The log line of an event, stamped with the time (seconds since 1970) unless it has one."""
    return MARK + json.dumps({"time": round(time.time(), 3), **event})


def decode(line: str) -> dict[str, Any] | None:
    """The event in a log line, or None if it holds none."""
    _, mark, text = line.partition(MARK)
    if not mark:
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The events in a file of JSON lines; a half-written last line is left out."""
    if not path.exists():
        return
    with path.open() as file:
        yield from parse(file)


def parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The events among JSON lines."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event
