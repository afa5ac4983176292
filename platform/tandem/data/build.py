"""Dataset build: corpus, tokenizer, shards and index, published atomically."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from tandem.data.index import INDEX_NAME, SHARDS_NAME, TOKENIZER_NAME, DatasetIndex, content_digest
from tandem.data.shards import shard_size, write_shards
from tandem.data.sources.corpus import Corpus, open_corpus, pinned_source
from tandem.data.sources.samples import Sample, size
from tandem.data.tokenize import TextEncoder, train_tokenizer
from tandem.errors import DataError
from tandem.storage import publish_folder

Progress = Callable[[str, int, int | None], None]
TOKENIZER_TEXT = 32 * 2**20
"""Characters that a tokenizer is trained on at most."""


def build_dataset(
    source: str,
    target: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    kind: str = "auto",
    shard_bytes: int | None = None,
    limit: int | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> DatasetIndex:
    """Build the dataset of `source` (see `corpus.open_corpus`) at `target`, which must not exist unless `replace`.

    `tokenizer`: a folder to take it from; None trains one of `vocab_size` on the corpus. `limit`: samples taken at most.
    `progress(stage, done, total)` is called with stages reading, tokenizer, shards.
    Raises DataError (no such corpus, a bad line, nothing usable) or StorageError (disk full); then nothing is left at `target`.
    """
    report: Progress = progress or (lambda stage, done, total: None)
    source = pinned_source(source)
    corpus = open_corpus(source, kind)
    samples = total = 0
    report("reading", 0, None)
    for sample in _limit_samples(corpus, limit):
        samples, total = samples + 1, total + size(sample)
        if samples % 100 == 0:
            report("reading", samples, None)
    if not samples:
        raise DataError(f"{source} holds no usable row: nothing but empty {corpus.kind}. Nothing was written.")
    report("reading", samples, samples)
    with publish_folder(target, replace=replace) as staging:
        folder = staging / TOKENIZER_NAME
        report("tokenizer", 0, 1)
        if tokenizer is None:
            train_tokenizer(_texts(corpus, limit), folder, vocab_size=vocab_size)
        else:
            folder.mkdir()
            for file in tokenizer_files(tokenizer):
                shutil.copyfile(file, folder / file.name)
        encoder = TextEncoder(str(folder))
        tokenizer_digest = encoder.digest()
        report("tokenizer", 1, 1)
        shards = write_shards(
            _limit_samples(corpus, limit),
            staging / SHARDS_NAME,
            shard_bytes=shard_bytes or shard_size(total, samples, corpus.kind),
            progress=lambda done: report("shards", done, samples),
        )
        index = DatasetIndex(
            kind=corpus.kind,
            samples=samples,
            shards=shards,
            digest=content_digest(corpus.kind, shards),
            source=source,
            tokenizer_digest=tokenizer_digest,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (staging / INDEX_NAME).write_text(index.to_json())
    return index


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in its (or a model's) folder; DataError if it has none."""
    if not (folder / "tokenizer.json").exists():
        raise DataError(f"{folder} holds no tokenizer.json. Give a folder with a tokenizer in Hugging Face's format.")
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def _limit_samples(corpus: Corpus, limit: int | None) -> Iterator[Sample]:
    return itertools.islice(corpus.samples(), limit)


def _texts(corpus: Corpus, limit: int | None) -> Iterator[str]:
    characters = 0
    for sample in _limit_samples(corpus, limit):
        if characters > TOKENIZER_TEXT:
            return
        characters += size(sample)
        yield from sample.texts
