"""`tandem quickstart`: train, fine-tune, serve and query a small model on text of the Python standard library."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from openai import AsyncOpenAI, OpenAI
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tandem.cli.serve import wait_for_interrupt
from tandem.cli.support.shell import friendly_errors
from tandem.data.index import DatasetIndex
from tandem.sdk.console import console
from tandem.sdk.keys import ensure_api_key
from tandem.sdk.serving import check_port
from tandem.sdk.session import Session, recipe
from tandem.settings import settings
from tandem.storage import require_space

TEXT, PAIRS = "quickstart-text", "quickstart-pairs"
SPACE_NEEDED = 400 * 2**20
STREAMS = 16
MAX_ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Score:
    """How many questions a model answered word for word."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right answers, 0 to 1."""
        return self.right / self.asked if self.asked else 0.0


def quickstart_command(
    leave: Annotated[
        bool, typer.Option("--exit", help="End when all is shown, instead of leaving the server up.")
    ] = False,
    port: Annotated[int | None, typer.Option(help="The server's port; TANDEM_PORT or 8000.")] = None,
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of both recipes, such as --set steps=50."),
    ] = [],  # noqa: B006
) -> None:
    """Train a small model on real text, fine-tune an adapter, serve both and ask them."""
    with friendly_errors():
        quickstart(leave=leave, port=port or settings().port, overrides=overrides)


def quickstart(*, leave: bool, port: int, overrides: list[str]) -> None:
    """Run the main job; each step is skipped where its result is there already."""
    started = time.monotonic()
    check_port(port)
    require_space(settings().root, SPACE_NEEDED, "The quickstart")
    console.print(
        Panel.fit(
            "[bold]Tandem[/] trains a small language model on this machine's Python library,\n"
            "teaches it what its functions do, and serves it. All of it lands in "
            f"[cyan]{settings().root}[/].",
            border_style="blue",
        )
    )
    with Session() as session:
        with step(1, "Text and tokenizer"):
            session.dataset("stdlib", TEXT)
            pairs = session.dataset("stdlib-docstrings", PAIRS, tokenizer=TEXT)
        with step(2, "Pretrain a model (Ray Train, 2 workers, FSDP2)"):
            base = session.train(recipe("quickstart_pretrain", overrides))
        with step(3, f"Fine-tune a LoRA adapter on {pairs.samples} questions"):
            adapter = session.train(recipe("quickstart_sft", [f"model.base={base}", *overrides]))
        with step(4, "Serve both, and ask them"):
            key_file = ensure_api_key()
            url = session.serve(base, port=port)
            show_answers(url, base, adapter)
            console.print(f"\n[dim]{time.monotonic() - started:.0f} s in all.[/]")
            say_what_next(url, adapter, key_file)
            if not leave:
                console.print(f"\nServing at [bold]{url}[/]. Ctrl-C ends it.")
                wait_for_interrupt()


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    """Head a step, and tell how long it took."""
    console.print(f"\n[bold blue]{number}[/] [bold]{title}[/]")
    began = time.monotonic()
    yield
    if number < 4:
        console.print(f"  [dim]{time.monotonic() - began:.0f} s[/]")


def questions() -> list[tuple[str, str]]:
    """The questions that the adapter was trained on, with their answers."""
    from tandem.data.shards import read_samples
    from tandem.data.sources.samples import Pair

    folder = settings().data_dir / PAIRS
    samples = read_samples(DatasetIndex.load(folder).shard_paths(folder))
    return [(s.prompt, s.answer) for s in samples if isinstance(s, Pair)]


def show_answers(url: str, base: str, adapter: str) -> None:
    """Ask both models a few questions aloud, then all of them, and print how many each knows word for word."""
    asked = questions()
    client = OpenAI(base_url=url, api_key=settings().sent_key, timeout=120, max_retries=2)
    for question, _ in asked[:3]:
        console.print(f"\n  [bold]{escape(question)}[/]")
        for model, colour in ((base, "yellow"), (adapter, "green")):
            console.print(f"    [{colour}]{model:<24}[/] ", end="")
            say_streaming(client, model, question)
    console.print()
    scores = {model: score(url, model, asked, console) for model in (base, adapter)}
    for model, result in scores.items():
        console.print(
            f"  [bold]{model}[/] answers {result.right} of {result.asked} questions word for word ({result.share:.0%})"
        )


def say_streaming(client: OpenAI, model: str, question: str) -> None:
    """Print an answer as its tokens come; a line's worth of it."""
    shown = 0
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=MAX_ANSWER_TOKENS,
        temperature=0,
        stream=True,
    ) as stream:
        for chunk in stream:
            piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            room = 100 - shown
            console.print(piece.replace("\n", " ")[:room], end="", markup=False, highlight=False, soft_wrap=True)
            shown += len(piece)
            if room < len(piece):
                console.print("…", end="")
                break
    console.print()


def score(url: str, model: str, asked: list[tuple[str, str]], output: Console) -> Score:
    """Ask every question, some at a time, and count the answers that are right word for word."""
    bar = Progress(
        TextColumn("  {task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        console=output, transient=True,
    )  # fmt: skip

    async def ask_all() -> int:
        gate = asyncio.Semaphore(STREAMS)
        async with AsyncOpenAI(base_url=url, api_key=settings().sent_key, timeout=120, max_retries=2) as client:

            async def ask(question: str, answer: str) -> bool:
                async with gate:
                    said = ""
                    stream = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": question}],
                        max_tokens=MAX_ANSWER_TOKENS,
                        temperature=0,
                        stream=True,
                    )
                    async for chunk in stream:
                        if chunk.choices:
                            said += chunk.choices[0].delta.content or ""
                    bar.advance(task)
                    return said.strip() == answer.strip()

            return sum(await asyncio.gather(*(ask(q, a) for q, a in asked)))

    with bar:
        task = bar.add_task(f"asking {model}", total=len(asked))
        return Score(asyncio.run(ask_all()), len(asked))


def say_what_next(url: str, adapter: str, key_file: Path | None) -> None:
    """Print the three commands to try next."""
    key = f'"Authorization: Bearer $(cat {shlex.quote(str(key_file))})"' if key_file else '"x-api-key: $TANDEM_API_KEY"'
    name = adapter.partition("@")[0]
    body = {"model": name, "messages": [{"role": "user", "content": questions()[0][0]}]}
    console.print("\n[bold]Try next[/], in another terminal:")
    for command in (
        f"tandem chat --model {name} --api-url {url}",
        f"curl {url}/chat/completions -H {key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
        "tandem models ls",
    ):
        console.print(f"  [cyan]{escape(command)}[/]", soft_wrap=True)
