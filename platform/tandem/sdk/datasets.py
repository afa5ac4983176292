"""Datasets built with a progress bar, and their descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tandem.data.index import DatasetIndex
from tandem.errors import ConfigError, UnknownModelError
from tandem.registry import Registry, find_model
from tandem.sdk.console import console
from tandem.settings import settings

if TYPE_CHECKING:
    pass


def build(
    source: str,
    target: Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    kind: str = "auto",
    limit: int | None = None,
    output: Console = console,
    replace: bool = False,
) -> DatasetIndex:
    """Build a dataset with a progress bar."""
    from tandem.data.build import build_dataset

    with build_progress(output) as progress:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        return build_dataset(
            source,
            target,
            tokenizer=find_tokenizer(tokenizer) if tokenizer else None,
            vocab_size=vocab_size,
            kind=kind,
            limit=limit,
            progress=show,
            replace=replace,
        )


def describe(index: DatasetIndex) -> str:
    """A dataset in a few words."""
    what = {"text": "texts", "pairs": "question-answer pairs", "chats": "chats", "preferences": "preferences"}[
        index.kind
    ]
    size = f"{index.characters:,} characters, " if index.characters else ""
    shards = f"{len(index.shards)} shard{'s' if len(index.shards) != 1 else ''}"
    return (
        f"{index.samples:,} {what}, {size}{index.total_bytes / 2**20:.1f} MiB in {shards}, digest {index.digest[:12]}"
    )


def find_tokenizer(name: str) -> Path:
    """The folder of a tokenizer: a path, the name of a dataset that has one, or a registered model's or one of the hub."""
    for folder in (settings().data_dir / name / "tokenizer", Path(name) / "tokenizer", Path(name)):
        if (folder / "tokenizer.json").exists():
            return folder
    try:
        found = find_model(name, Registry.open(), "--tokenizer")
    except (UnknownModelError, ConfigError) as error:
        raise ConfigError(
            f"No tokenizer at {name}: neither a folder with tokenizer.json nor a dataset in {settings().data_dir}, and no model. "
            f"{error}"
        ) from error
    return found if isinstance(found, Path) else found.path


def build_progress(output: Console) -> Progress:
    """The progress bars of a build."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=output,
    )
