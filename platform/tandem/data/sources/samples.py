"""Sample kinds: texts, question-answer pairs, chats and preferences; and conversion of records into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tandem.data.index import Kind
from tandem.errors import DataError


@dataclass(frozen=True, slots=True)
class Text:
    """A document to continue."""

    text: str
    kind: ClassVar[Kind] = "text"

    @property
    def texts(self) -> tuple[str, ...]:
        """Its strings."""
        return (self.text,)

    @property
    def useful(self) -> bool:
        """Whether something can be learned from it."""
        return bool(self.text)


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and the answer to learn."""

    prompt: str
    answer: str
    kind: ClassVar[Kind] = "pairs"

    @property
    def texts(self) -> tuple[str, ...]:
        """Its strings."""
        return (self.prompt, self.answer)

    @property
    def useful(self) -> bool:
        """Whether something can be learned from it."""
        return bool(self.answer.strip())


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in which to learn what the assistant says."""

    messages: tuple[Message, ...]
    kind: ClassVar[Kind] = "chats"

    @property
    def texts(self) -> tuple[str, ...]:
        """Its strings."""
        return tuple(message.content for message in self.messages)

    @property
    def useful(self) -> bool:
        """Whether something can be learned from it."""
        return any(message.role == "assistant" and message.content.strip() for message in self.messages)


@dataclass(frozen=True, slots=True)
class Preference:
    """A question with two answers, the better one and the worse one."""

    prompt: str | tuple[Message, ...]
    """What the user says, or the turns of a chat before the answers."""
    chosen: str
    rejected: str
    kind: ClassVar[Kind] = "preferences"

    @property
    def turns(self) -> tuple[Message, ...]:
        """The chat before the answers."""
        return (Message("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt

    @property
    def texts(self) -> tuple[str, ...]:
        """Its strings."""
        return (*(turn.content for turn in self.turns), self.chosen, self.rejected)

    @property
    def useful(self) -> bool:
        """Whether something can be learned from it."""
        return bool(self.chosen.strip() and self.rejected.strip()) and self.chosen != self.rejected


Sample = Text | Pair | Chat | Preference


def size(sample: Sample) -> int:
    """Characters."""
    return sum(map(len, sample.texts))


def _chat(messages: Any) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"is {_with_article(messages)}; it must be a list of messages")
    return Chat(tuple(_message(number, message) for number, message in enumerate(messages)))


SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Roles as ShareGPT's files name them."""


def _message(number: int, message: Any) -> Message:
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return Message(SPEAKERS.get(role, role), content)
    raise ValueError(f"[{number}] is not a message with the strings role and content")


def _chat_preference(prompt: Any, chosen: Any, rejected: Any) -> Preference:
    """A line of OpenAI's preference format: `input` with `messages`, and an output of one message of the assistant each."""
    if not isinstance(prompt, dict) or "messages" not in prompt:
        raise ValueError("of a preference must be an object with messages")
    return Preference(_chat(prompt["messages"]).messages, _output(chosen), _output(rejected))


def _output(messages: Any) -> str:
    (message,) = turns if len(turns := _chat(messages).messages) == 1 else (None,)
    if message is None or message.role != "assistant":
        raise ValueError("must have outputs of one message of the assistant each")
    return message.content


def _instruction(instruction: str, output: str, input_text: str = "") -> Pair:
    return Pair(f"{instruction}\n\n{input_text}" if input_text.strip() else instruction, output)


_SHAPES: tuple[tuple[tuple[str, ...], Callable[..., Sample]], ...] = (
    (("prompt", "chosen", "rejected"), Preference),
    (("input", "preferred_output", "non_preferred_output"), _chat_preference),
    (("messages",), _chat),
    (("conversations",), _chat),
    (("prompt", "answer"), Pair),
    (("prompt", "completion"), Pair),
    (("prompt", "response"), Pair),
    (("question", "answer"), Pair),
    (("instruction", "output", "input"), _instruction),
    (("instruction", "output"), _instruction),
    (("input", "output"), Pair),
    (("text",), Text),
)
KEYS = frozenset(key for keys, _ in _SHAPES for key in keys)
"""Fields that a sample can be made of."""


def sample_of(record: dict[str, Any], location: str) -> Sample:
    """The sample in a record; DataError, naming `location`, if it is none."""
    for keys, make in _SHAPES:
        if not all(key in record for key in keys):
            continue
        values = [record[key] for key in keys]
        if make in (_chat, _chat_preference):
            try:
                return make(*values)
            except ValueError as error:
                raise DataError(f"{location}: {keys[0]!r} {error}.") from error
        for key, value in zip(keys, values, strict=True):
            if not isinstance(value, str):
                raise DataError(f"{location}: {key!r} is {_with_article(value)}; it must be a string.")
        return make(*values)
    raise DataError(
        f"{location} has the keys {', '.join(map(str, record)) or '(none)'}; it needs "
        '"text", or "prompt" and "answer" (or "input" and "output", "question" and "answer", "instruction" and "output"), '
        'or "messages" (each with "role" and "content"), or "prompt", "chosen" and "rejected" (or "input", '
        '"preferred_output" and "non_preferred_output").'
    )


def _with_article(value: Any) -> str:
    return "empty" if value is None or value == [] else f"a {type(value).__name__}"
