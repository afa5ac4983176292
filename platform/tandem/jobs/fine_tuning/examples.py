"""Examples of a fine-tuning file as a dataset, and their sizes in tokens."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.data.build import build_dataset
from tandem.data.index import DatasetIndex
from tandem.data.shards import read_samples
from tandem.data.spec import PackSpec
from tandem.data.tokenize import TextEncoder
from tandem.errors import ConfigError, DataError
from tandem.jobs.fine_tuning.spec import Method
from tandem.storage import file_system, store_errors

SHORTEST_ROW = 64
"""Tokens of a packed row at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of a dataset."""

    examples: int
    sequence_length: int
    """Tokens in a packed row."""
    rows: int
    """Packed rows in an epoch."""


def build_examples(location: str, file_id: str, target: Path, *, tokenizer: Path, method: Method) -> DatasetIndex:
    """Build the dataset of a file in the folder `target`; one that is there already is replaced.

    DataError names the file by its id and the line, and a file of another method's format.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copy = Path(folder) / "file.jsonl"
        with store_errors(location, "read"):
            files = file_system(location)
            with files.open(location, "rb") as reader, copy.open("wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
        try:
            index = build_dataset(str(copy), target, tokenizer=tokenizer, replace=True)
        except (DataError, ConfigError) as error:
            raise DataError(str(error).replace(str(copy), file_id)) from error
    if (index.kind == "preferences") != (method is Method.DPO):
        formats = {Method.DPO: "input, preferred_output and non_preferred_output", Method.SUPERVISED: "messages"}
        raise DataError(
            f"{file_id} holds {index.kind}, and the method is {method.value}. Each line must have {formats[method]}."
        )
    return index


def sizes_of(index: DatasetIndex, folder: Path, tokenizer: Path, *, longest: int) -> Sizes:
    """Count a dataset's rows, which are as long as its longest example: a power of 2, at most `longest`.

    DataError if no example leaves something to learn within that length.
    """
    shards = index.shard_paths(folder)
    spec = PackSpec(encoder=TextEncoder(str(tokenizer)), kind=index.kind, length=longest, loss_on_all=False)
    longest_example = max(tokens for shard in shards for tokens in spec.lengths(read_samples([shard])))
    length = min(longest, max(SHORTEST_ROW, 1 << (longest_example - 1).bit_length()))
    spec = replace(spec, length=length)
    rows = sum(len(spec.rows(read_samples([shard]))) for shard in shards)
    if not rows:
        raise DataError(
            f"No example has anything to learn within {length} tokens, which the model or `gateway.fine_tuning.sequence_length` "
            "allows: the assistant speaks after that. Shorten the examples."
        )
    return Sizes(examples=index.samples, sequence_length=length, rows=rows)
