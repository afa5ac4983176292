"""WebDataset shards: tar files of KEY.txt or KEY.json, written in order, with a digest of each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tandem.data.index import ShardInfo
from tandem.data.sources.samples import Chat, Message, Pair, Preference, Sample, Text, size
from tandem.data.tar import members
from tandem.ids import file_digest
from tandem.storage import Location, disk_errors, file_system

TARGET_SHARDS = 64
LARGEST_SHARD = 8 * 2**20
FIXED: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "", "group": "", "mode": 0o644}
"""Fixed fields of each member's header: the bytes of a shard depend on its samples alone."""


def shard_size(total: int, samples: int, kind: str) -> int:
    """Characters a shard should hold: about 64 shards, none above 8 MiB, and of samples that stay whole at least 6 in each.

    Many shards mix well and are read by many; several lie packed in memory at a time, so a shard stays small.
    """
    min_characters = 6 * total // max(1, samples) if kind != "text" else 4096
    return max(1, min(LARGEST_SHARD, max(total // TARGET_SHARDS, min_characters)))


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
        batch_characters = samples_written = 0
        for sample in samples:
            batch.append(sample)
            batch_characters += size(sample)
            if batch_characters >= shard_bytes:
                written.append(_write_shard(batch, folder / f"{len(written):06d}.tar", samples_written))
                samples_written += len(batch)
                batch, batch_characters = [], 0
                if progress:
                    progress(samples_written)
        if batch:
            written.append(_write_shard(batch, folder / f"{len(written):06d}.tar", samples_written))
            if progress:
                progress(samples_written + len(batch))
    return tuple(written)


def _write_shard(samples: list[Sample], path: Path, first: int) -> ShardInfo:
    # Imports torch, which readers of shards do not need.
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, **FIXED) as tar:
        for key, sample in enumerate(samples, first):
            if isinstance(sample, Text):
                extension, content = "txt", sample.text
            else:
                extension, content = "json", json.dumps(dataclasses.asdict(sample), ensure_ascii=False)
            tar.write({"__key__": f"{key:08d}", extension: content.encode("utf-8", "replace")})
    return ShardInfo(
        name=path.name,
        samples=len(samples),
        characters=sum(map(size, samples)),
        bytes=path.stat().st_size,
        sha256=file_digest(path),
    )


def read_samples(paths: Iterable[Location]) -> Iterator[Sample]:
    """The samples in shards that `write_shards` wrote, in order."""
    for path in paths:
        with file_system(path).open(str(path), "rb") as file:
            yield from samples_in(file)


def samples_in(file: IO[bytes]) -> Iterator[Sample]:
    """The samples in one such shard."""
    for member in members(file):
        yield decode_json(member.data) if member.name.endswith(".json") else Text(member.data.decode())


def decode_json(data: bytes) -> Pair | Chat | Preference:
    """The sample in a KEY.json."""
    value = json.loads(data)
    if "messages" in value:
        return Chat(tuple(Message(**message) for message in value["messages"]))
    if "chosen" in value:
        prompt = value["prompt"]
        turns = prompt if isinstance(prompt, str) else tuple(Message(**message) for message in prompt)
        return Preference(turns, value["chosen"], value["rejected"])
    return Pair(value["prompt"], value["answer"])
