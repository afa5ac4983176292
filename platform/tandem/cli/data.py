"""`tandem data`: build datasets, and inspect them as packed rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.text import Text

from tandem.cli.support.shell import friendly_errors
from tandem.config import check
from tandem.errors import ConfigError
from tandem.ids import check_name
from tandem.sdk.console import console
from tandem.sdk.datasets import build, describe, find_tokenizer
from tandem.settings import settings

if TYPE_CHECKING:
    from tandem.data.inspect import InspectedRow, Side

data_app = typer.Typer(no_args_is_help=True, help="Build datasets to train on, and look into them.")
SKIPPED_SHOWN = 5
"""Names of files that a build has not read, in its message."""
BOUNDARY = "\u2551"
"""Between two documents of a row."""


@data_app.command("build")
def build_command(
    source: Annotated[
        str,
        typer.Argument(
            help="Text, JSON lines, Parquet, Arrow or WebDataset shards: a file, or a folder of such files, or one that Hugging "
            "Face's datasets saved; or hf://datasets/ORG/NAME, of its hub; or 'stdlib', "
            "'stdlib-docstrings' or 'stdlib-preferences', which every Python has."
        ),
    ],
    name: Annotated[str, typer.Argument(help="What the dataset is called; it is written to TANDEM_HOME/data/NAME.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A tokenizer's folder, or a dataset or model whose tokenizer to use. None: train one on the texts."
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries of a tokenizer that is trained.")] = 4096,
    kind: Annotated[str, typer.Option(help="text, pairs, chats, preferences, or auto.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many samples.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a dataset of that name.")] = False,
) -> None:
    """Turn a source into WebDataset shards with a tokenizer and an index."""
    with friendly_errors():
        target = settings().data_dir / check_name(name, "dataset name")
        if target.exists() and not replace:
            raise ConfigError(f"{target} exists already. Choose another name, or add --replace.")
        from tandem.data.sources.corpus import KINDS, folder_files

        check.one_of("--kind", kind, KINDS)
        files = folder_files(source)
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
        if files is not None and files.skipped:
            shown = ", ".join(str(p.relative_to(Path(source).expanduser())) for p in files.skipped[:SKIPPED_SHOWN])
            more = ", ..." if len(files.skipped) > SKIPPED_SHOWN else ""
            console.print(
                f"  [dim]·[/] {len(files.read):,} files read, {len(files.skipped):,} not: {escape(shown)}{more}",
                soft_wrap=True,
            )


@data_app.command("pull")
def pull_command(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME[@REVISION][/PATH]",
            help="Of the hub, also as hf://datasets/ORG/NAME. PATH: a file, a folder or a pattern; else the training split.",
        ),
    ],
) -> None:
    """Download a dataset's files from the Hugging Face hub, for a later `tandem data build`, which does it by itself too."""
    with friendly_errors():
        from tandem.data.sources.corpus import pull_files

        found = pull_files(dataset)
        count = f"{len(found.paths)} file{'s' if len(found.paths) != 1 else ''}"
        console.print(
            f"[bold]{escape(found.ref.repo)}[/]: {count}, {found.size / 2**20:.1f} MiB, commit {found.ref.revision[:12]}"
        )
        console.print(f"build it: [cyan]tandem data build {escape(str(found.ref))} NAME[/]", soft_wrap=True)


@data_app.command("inspect")
def inspect_command(
    name: Annotated[str, typer.Argument(help="A dataset of TANDEM_HOME/data, a folder, or a URI.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="Rows to leave out first.")] = 0,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens in a row, as data.sequence_length.")] = 256,
    loss_on: Annotated[str, typer.Option(help="auto, all or answers, as data.loss_on.")] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer's folder (a model's), or a dataset's name. None: the dataset's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with token ids, labels and positions.")] = False,
) -> None:
    """Show rows as the model sees them: what carries loss in green, the rest dim, documents apart."""
    with friendly_errors():
        from tandem.data.index import TOKENIZER_NAME, find_dataset
        from tandem.data.inspect import inspect_rows
        from tandem.data.tokenize import TextEncoder

        check.one_of("--loss-on", loss_on, ("auto", "all", "answers"))
        dataset = find_dataset(name)
        index = dataset.index
        encoder = TextEncoder(str(find_tokenizer(tokenizer) if tokenizer else dataset.folder / TOKENIZER_NAME))
        every = inspect_rows(dataset, encoder, length=sequence_length, loss_on_all=loss_on == "all")
        found = list(itertools.islice(every, skip, skip + rows))
        if as_json:
            shown = [{**asdict(row), "sides": [asdict(s) | {"learned": s.learned} for s in row.sides]} for row in found]
            about = {"dataset": str(dataset.location), **asdict(index), "vocabulary": encoder.vocab_size}
            del about["shards"]
            console.print_json(json.dumps({**about, "shards": len(index.shards), "rows": shown}), ensure_ascii=True)
            return
        console.print(f"[bold]{escape(name)}[/]: {describe(index)}; {encoder.vocab_size:,} tokens in the vocabulary")
        console.print(f"[green]carries loss[/], [dim]does not[/], {BOUNDARY} between documents")
        for row in found:
            for side in row.sides:
                console.print()
                console.print(_headline(row, side))
                console.print(draw(side), soft_wrap=True)
        if not found:
            console.print(f"There is no row after the first {skip:,} of {sequence_length} tokens.")


def _headline(row: InspectedRow, side: Side) -> str:
    what = f", {side.name}" if side.name else ""
    documents = f"{len(side.documents)} document{'s' if len(side.documents) > 1 else ''}"
    padding = f", {side.padding} to fill up" if side.padding else ""
    return (
        f"[bold cyan]{row.shard} row {row.row}{what}[/] {documents}, {side.learned} of {len(side.ids)} tokens carry loss"
        f"{padding}"
    )


def draw(side: Side) -> Text:
    """A side of a row in colours."""
    drawn = Text()
    for number, document in enumerate(side.documents):
        if number:
            drawn.append(f" {BOUNDARY} ", "bold magenta")
        for span in document:
            drawn.append(span.text, "green" if span.learned else "dim")
    return drawn
