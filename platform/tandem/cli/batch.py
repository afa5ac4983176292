"""`tandem batch`: batch inference over a file of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.support.shell import friendly_errors
from tandem.config import BatchConfig, located
from tandem.config.load import apply_overrides, from_dict, read_yaml
from tandem.sdk.batch import run_batch

batch_app = typer.Typer(no_args_is_help=True, help="Answer a file of prompts.")

ROWS_FAILED = 3
"""Exit status of a run that ended well and has rows without an answer."""


@batch_app.command("run")
def run_command(
    input_: Annotated[
        str | None,
        typer.Option("--input", "-i", help="Rows: .jsonl, .parquet, .tar (WebDataset), a folder, a pattern, a URI."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Who answers rows that name nobody; also ORG/NAME of the hub.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="A folder, or a .jsonl; also by URI.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The run as YAML; options win over it.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat", help="Ask the `prompt` of plain rows as a user's message, through the chat template."),
    ] = None,
    on_app: Annotated[
        bool | None,
        typer.Option(
            "--on-app", help="Send the rows to the app that serves, behind its clients, instead of own engines."
        ),
    ] = None,
    api_url: Annotated[
        str | None, typer.Option(help="With --on-app: the app; TANDEM_API_URL, or the app of this home.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="With --on-app: its key; TANDEM_API_KEY.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value: -s request.max_tokens=64")
    ] = [],  # noqa: B006  (typer copies it)
) -> None:
    """Answer every row once. The same command resumes a run that was stopped for any reason.

    Leaves with 3 if rows have no answer.
    """
    with friendly_errors(), located(config, overrides):
        values = apply_overrides(read_yaml(config) if config else {}, overrides)
        given = {"input": input_, "model": model, "output": output, "chat": chat, "on_app": on_app}
        run_config = from_dict(BatchConfig, values | {key: value for key, value in given.items() if value is not None})
        if run_batch(run_config, api_url=api_url, api_key=api_key).failed:
            raise SystemExit(ROWS_FAILED)
