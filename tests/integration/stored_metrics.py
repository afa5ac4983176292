"""Reads back what the metrics sinks stored: {tag: [(step, value), ...]} in the order it was written."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Series = dict[str, list[tuple[int, float]]]


def tensorboard(folder: Path) -> Series:
    """All event files below a folder: records of length, checksum, bytes, checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    found: Series = defaultdict(list)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
            at += length + 16
    return dict(found)


def wandb_offline(job: Path) -> tuple[set[str], Series]:
    """The ids and the numbers of all runs that W&B wrote below a job's folder in offline mode."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, found = set(), defaultdict(list)
    for path in sorted(job.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_log(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                for tag, value in items.items():
                    if "/" in tag:
                        found[tag].append((items["step"], value))
    return ids, dict(found)


def leveldb_log(content: bytes, block: int = 32768) -> Iterator[bytes]:
    """The records of W&B's file: 7 bytes of its own, then LevelDB's log of checksum, length, part, bytes, in blocks."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, part = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # the whole of a record, or its last part
            yield parts
            parts = b""


def mlflow(uri: str, experiment: str) -> tuple[set[str], Series]:
    """The job ids and the numbers of all runs of an MLflow experiment."""
    from mlflow import MlflowClient

    client, found, jobs = MlflowClient(tracking_uri=uri), {}, set()
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    for run in client.search_runs([known.experiment_id]):
        jobs.add(run.data.tags["tandem.job"])
        for tag in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, tag)
            found.setdefault(tag, []).extend((m.step, m.value) for m in history)
    return jobs, found
