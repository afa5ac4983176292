"""`tandem data`: build datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from tandem.cli.shell import console, friendly_errors
from tandem.data.index import DatasetIndex
from tandem.errors import ConfigError
from tandem.ids import check_name
from tandem.settings import settings

data_app = typer.Typer(no_args_is_help=True, help="Build datasets to train on.")


@data_app.callback()
def _data() -> None:
    """Keeps `build` a subcommand."""


@data_app.command("build")
def build_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Text, JSON lines, Parquet, Arrow or WebDataset shards: a file, or a folder of such files, or one that Hugging "
            "Face's datasets saved; or 'stdlib', 'stdlib-docstrings' or 'stdlib-preferences', which every Python has."
        ),
    ],
    name: Annotated[str, typer.Argument(help="What the dataset is called; it is written to TANDEM_HOME/data/NAME.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer's folder, or a dataset whose tokenizer to use. None: train one on the texts."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries of a tokenizer that is trained.")] = 4096,
    kind: Annotated[str, typer.Option(help="text, pairs, chats, preferences, or auto.")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Use at most this many samples.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a dataset of that name.")] = False,
) -> None:
    """Turn a source into WebDataset shards with a tokenizer and an index."""
    with friendly_errors():
        target = settings().data_dir / check_name(name, "dataset name")
        if target.exists() and not replace:
            raise ConfigError(f"{target} exists already. Choose another name, or add --replace.")
        index = build(
            source,
            target,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            kind=kind,
            limit=limit,
            output=console,
            replace=replace,
        )
        console.print(f"[green]✓[/] [bold]{name}[/]: {describe(index)}, {target}")


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
    return f"{index.samples:,} {what}, {index.total_bytes / 2**20:.1f} MiB in {len(index.shards)} shards"


def find_tokenizer(name: str) -> Path:
    """The folder of a tokenizer: a path, or the name of a dataset that has one."""
    for folder in (settings().data_dir / name / "tokenizer", Path(name) / "tokenizer", Path(name)):
        if (folder / "tokenizer.json").exists():
            return folder
    raise ConfigError(
        f"No tokenizer at {name}: neither a folder with tokenizer.json nor a dataset in {settings().data_dir}."
    )


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
