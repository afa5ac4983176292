"""WebDataset shards: tar files of KEY.txt or KEY.json, written in order, with a digest of each."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from tandem.data.index import ShardInfo
from tandem.data.sources.samples import Chat, Message, Pair, Preference, Sample, Text, size
from tandem.ids import file_digest
from tandem.storage import disk_errors

TARGET_SHARDS = 64
LARGEST_SHARD = 8 * 2**20


def shard_size(total: int, samples: int, kind: str) -> int:
    """Characters a shard should hold: about 64 shards, none above 8 MiB, and of samples that stay whole at least 6 in each.

    Many shards mix well and are read by many; several lie packed in memory at a time, so a shard stays small.
    """
    fewest = 6 * total // max(1, samples) if kind != "text" else 4096
    return max(1, min(LARGEST_SHARD, max(total // TARGET_SHARDS, fewest)))


def write_shards(
    samples: Iterable[Sample], folder: Path, *, shard_bytes: int, progress: Callable[[int], None] | None = None
) -> tuple[ShardInfo, ...]:
    """Write `samples` into `folder` (created), a new shard once one holds `shard_bytes` characters.

    The same samples give the same bytes. A full disk is a StorageError.
    """
    written: list[ShardInfo] = []
    with disk_errors("writing shards", folder):
        folder.mkdir(parents=True, exist_ok=True)
        batch: list[Sample] = []
        held = done = 0
        for sample in samples:
            batch.append(sample)
            held += size(sample)
            if held >= shard_bytes:
                written.append(_write_shard(batch, folder / f"{len(written):06d}.tar", done))
                done += len(batch)
                batch, held = [], 0
                if progress:
                    progress(done)
        if batch:
            written.append(_write_shard(batch, folder / f"{len(written):06d}.tar", done))
            if progress:
                progress(done + len(batch))
    return tuple(written)


def _write_shard(samples: list[Sample], path: Path, first: int) -> ShardInfo:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in enumerate(samples, first):
            if isinstance(sample, Text):
                name, data = f"{key:08d}.txt", sample.text.encode("utf-8", "replace")
            else:
                text = json.dumps(dataclasses.asdict(sample), ensure_ascii=False)
                name, data = f"{key:08d}.json", text.encode("utf-8", "replace")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return ShardInfo(
        name=path.name,
        samples=len(samples),
        characters=sum(map(size, samples)),
        bytes=path.stat().st_size,
        sha256=file_digest(path),
    )


def read_samples(paths: Iterable[Path]) -> Iterator[Sample]:
    """The samples in shards that `write_shards` wrote, in order."""
    for path in paths:
        with path.open("rb") as file:
            yield from samples_in(file)


def samples_in(file: IO[bytes]) -> Iterator[Sample]:
    """The samples in one such shard."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            data = opened.read() if opened else b""
            yield decode_json(data) if member.name.endswith(".json") else Text(data.decode())


def decode_json(data: bytes) -> Pair | Chat | Preference:
    """The sample in a KEY.json."""
    value = json.loads(data)
    if "messages" in value:
        return Chat(tuple(Message(**message) for message in value["messages"]))
    if "chosen" in value:
        return Preference(value["prompt"], value["chosen"], value["rejected"])
    return Pair(value["prompt"], value["answer"])
