"""`tandem chat`: talk to a served model from the terminal, streaming; or ask one question from a script."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tandem.cli.support.shell import friendly_errors, interrupt_taken
from tandem.errors import ConfigError, TandemError, did_you_mean
from tandem.sdk.address import find_api_url
from tandem.sdk.console import console as terminal
from tandem.sdk.talk import Talker, the_only, unknown_model
from tandem.settings import settings

PROMPT = "you> "
COMMANDS = {
    "/model NAME": "talk to another model; without a name, say which it is",
    "/models": "list what is served",
    "/system TEXT": "set the system prompt; without a text, remove it",
    "/clear": "forget the conversation",
    "/help": "this list",
    "/quit": "leave (also Ctrl-D; Ctrl-C stops an answer, and a second one leaves)",
}


def chat_command(
    question: Annotated[
        str | None, typer.Argument(help="Ask this and leave. Without it: a conversation, or stdin where that is piped.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model or adapter. None: the one served.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    api_url: Annotated[str | None, typer.Option(help="The server; TANDEM_API_URL, or the app of this home.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key; TANDEM_API_KEY.")] = None,
    slurm: Annotated[
        str | None, typer.Option(metavar="JOB", help="The app of a Slurm job ('latest': the newest), with its key.")
    ] = None,
) -> None:
    """Talk to a served model, or ask it one question."""
    with friendly_errors(), _server(api_url, api_key, slurm) as (url, key):
        chat(
            model,
            url,
            key,
            question=question,
            system=system,
            temperature=temperature,
            max_tokens=max_tokens,
        )


@contextlib.contextmanager
def _server(api_url: str | None, api_key: str | None, slurm: str | None) -> Iterator[tuple[str | None, str | None]]:
    """Address and key for the length of a block: those that were given, or of a Slurm job's app."""
    if slurm is None:
        yield api_url, api_key
        return
    if api_url or api_key:
        raise ConfigError("--slurm says where the server is, and its key. Leave out --api-url and --api-key.")
    # Imported here: other servers need neither ssh nor Slurm's files.
    from tandem.sdk.slurm import job_app, read_site

    with job_app(slurm, read_site()) as found:
        yield found


def chat(
    model: str | None = None,
    api_url: str | None = None,
    api_key: str | None = None,
    *,
    question: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    console: Console = terminal,
) -> None:
    """Hold a conversation, or answer `question` (or what is piped to stdin) on stdout with nothing around it.

    Raises a TandemError where the server does not answer or does not know the model.
    """
    url, key = find_api_url(api_url), api_key or settings().sent_key
    talker = Talker(api_url=url, api_key=key, temperature=temperature, max_tokens=max_tokens)
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise ConfigError('There is no question: stdin is empty. Pipe one in, or run `tandem chat "question"`.')
    conversation = Conversation(system=system)
    if question is not None:
        ask_once(talker, model or the_only(talker.models()), conversation, question)
        return
    served = talker.models()
    if model is None and not served:
        the_only(served)
    if model is not None and model not in served:
        raise unknown_model(model, served)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its arrow keys and history
    Chat(talker=talker, model=model or served[0], conversation=conversation, console=console).run()


def ask_once(talker: Talker, model: str, conversation: Conversation, question: str) -> None:
    """Print the answer to one question on stdout as it comes, and nothing else."""
    pieces = talker.ask(model, conversation.asking(question))
    with contextlib.closing(pieces):
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not talker.answer.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()


@dataclass(kw_only=True)
class Conversation:
    """What was said so far."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def asking(self, question: str) -> list[dict[str, str]]:
        """The messages that ask `question` after all that was said."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """Remember a turn."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(kw_only=True)
class Chat:
    """A conversation at the terminal."""

    talker: Talker
    model: str
    conversation: Conversation
    console: Console
    read: Callable[[str], str] = input
    """Reads a line; raises EOFError at the end."""

    def run(self) -> None:
        """Read and answer until the person leaves."""
        self.console.print(f"Talking to [bold]{escape(self.model)}[/]. [dim]/help lists the commands.[/]")
        while True:
            try:
                line = self.read(PROMPT).strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.answer(line)
            except TandemError as error:
                self.console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)

    def answer(self, question: str) -> None:
        """Ask, and print the answer as it comes; a Ctrl-C stops it, and what came stays in the conversation."""
        stopped = False
        pieces = self.talker.ask(self.model, self.conversation.asking(question))
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    self.console.print(piece, end="", markup=False, emoji=False, soft_wrap=True)
        except KeyboardInterrupt:
            interrupt_taken()
            stopped = True
        finally:
            self.console.print()
        answer = self.talker.answer
        if answer.text:
            self.conversation.add(question, answer.text)
        notes = ["stopped"] if stopped else []
        if answer.tokens and answer.seconds:
            notes.append(f"{answer.tokens} tokens, {answer.tokens / answer.seconds:.0f} tok/s")
        if answer.first_s is not None:
            notes.append(f"first after {answer.first_s:.2f} s")
        if answer.cut:
            notes.append("cut at the token limit")
        self.console.print(f"[dim]{'; '.join(notes) or 'an empty answer'}[/]")

    def obey(self, line: str) -> None:
        """Run one /command."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        match command:
            case "/model":
                self.change_model(argument)
            case "/models":
                for name in self.talker.models():
                    self.console.print(f"{'[green]*[/]' if name == self.model else ' '} {escape(name)}")
            case "/system":
                self.conversation.system = argument or None
                self.console.print("[dim]System prompt set.[/]" if argument else "[dim]No system prompt.[/]")
            case "/clear":
                self.conversation.turns.clear()
                self.console.print("[dim]Forgotten.[/]")
            case "/help":
                for usage, meaning in COMMANDS.items():
                    self.console.print(f"[cyan]{usage:<14}[/] {meaning}")
            case _:
                known = [usage.split()[0] for usage in COMMANDS]
                self.console.print(f"[red]{escape(command)} is no command.{did_you_mean(command, known)}[/] See /help.")

    def change_model(self, name: str) -> None:
        """Talk to another model, with the conversation so far; UnknownModelError if it is not served."""
        if name:
            served = self.talker.models()
            if name not in served:
                raise unknown_model(name, served)
            self.model = name
        self.console.print(f"Talking to [bold]{escape(self.model)}[/].")
