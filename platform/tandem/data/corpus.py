"""Where text comes from: the standard library, JSON lines, text files. A corpus can be read again and again, always alike.

Every bad line is a DataError that names its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tandem.data import stdlib
from tandem.data.index import Kind
from tandem.errors import DataError, did_you_mean

TEXT_SUFFIXES = (".txt", ".md", ".py")
BUILT_IN = ("stdlib", "stdlib-docstrings", "stdlib-preferences")


@dataclass(frozen=True, slots=True)
class Text:
    """A document to continue."""

    text: str
    kind: ClassVar[Kind] = "text"

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.text)


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and the answer to learn."""

    prompt: str
    answer: str
    kind: ClassVar[Kind] = "pairs"

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Preference:
    """A question with two answers, the better one and the worse one."""

    prompt: str
    chosen: str
    rejected: str
    kind: ClassVar[Kind] = "preferences"

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


Sample = Text | Pair | Preference


class Corpus(Protocol):
    """A source of samples of one kind."""

    @property
    def kind(self) -> Kind:
        """text, pairs or preferences."""
        ...

    def samples(self) -> Iterator[Sample]:
        """The samples from the first; the same at each call."""
        ...


def open_corpus(source: str, kind: str = "auto") -> Corpus:
    """The corpus that `source` names: one of BUILT_IN, a .jsonl or .txt file, or a folder of text files.

    Raises DataError if there is none, or if it is not of the `kind` asked for (auto, text, pairs or preferences).
    """
    corpus = _open(source, kind)
    if kind not in ("auto", corpus.kind):
        raise DataError(f"{source} holds {corpus.kind}, not {kind}.")
    return corpus


def _open(source: str, kind: str) -> Corpus:
    if source == "stdlib":
        return StdlibTexts()
    if source == "stdlib-docstrings":
        return StdlibQuestions()
    if source == "stdlib-preferences":
        return StdlibPreferences()
    path = Path(source).expanduser()
    if path.is_dir():
        return TextFolder(path)
    if not path.exists():
        near = [*BUILT_IN, *(p.name for p in path.parent.iterdir())] if path.parent.is_dir() else list(BUILT_IN)
        raise DataError(
            f"No corpus at {source}.{did_you_mean(path.name, near)} Give a .jsonl or .txt file, a folder of "
            f"{', '.join(TEXT_SUFFIXES)} files, or one of {', '.join(BUILT_IN)}."
        )
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path, _kind_of(path) if kind == "auto" else kind)  # type: ignore[arg-type]
    if path.suffix in TEXT_SUFFIXES:
        return TextFile(path)
    raise DataError(
        f"{source} is a {path.suffix or 'file without suffix'}; known are .jsonl, {', '.join(TEXT_SUFFIXES)}."
    )


@dataclass(frozen=True)
class StdlibTexts:
    """The sources of the running interpreter's standard library, a file a document."""

    kind: Kind = "text"

    def samples(self) -> Iterator[Sample]:
        """Files in the order of their paths."""
        for path in stdlib.source_files():
            text = stdlib.read_source(path)
            if text.strip():
                yield Text(text)


@dataclass(frozen=True)
class StdlibQuestions:
    """What a function of the standard library does, as its docstring says."""

    kind: Kind = "pairs"

    def samples(self) -> Iterator[Sample]:
        """Questions, those of the best known modules first."""
        for prompt, answer in stdlib.questions():
            yield Pair(prompt, answer)


@dataclass(frozen=True)
class StdlibPreferences:
    """What a function of the standard library does: what its docstring says, rather than what that of another one does."""

    kind: Kind = "preferences"

    def samples(self) -> Iterator[Sample]:
        """Questions in the order of StdlibQuestions; the worse answer is that of the question after."""
        found = list(stdlib.questions())
        for (prompt, chosen), (_, rejected) in zip(found, [*found[1:], *found[:1]], strict=True):
            yield Preference(prompt, chosen, rejected)


@dataclass(frozen=True)
class TextFile:
    """A text file, cut at blank lines so that even a small one gives many shards."""

    path: Path
    kind: Kind = "text"

    def samples(self) -> Iterator[Sample]:
        """Pieces in order."""
        text = _read_text(self.path)
        yield from (Text(piece) for piece in cut(text, max(512, min(64 * 1024, len(text) // 64))))


@dataclass(frozen=True)
class TextFolder:
    """Every text file below a folder, a file a document."""

    path: Path
    kind: Kind = "text"

    def samples(self) -> Iterator[Sample]:
        """Files in the order of their paths."""
        for path in sorted(p for p in self.path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()):
            yield from (Text(piece) for piece in cut(_read_text(path), 64 * 1024))


@dataclass(frozen=True)
class JsonLines:
    """A JSON object a line: {"text"}, {"prompt", "answer"}, {"input", "output"} or {"prompt", "chosen", "rejected"}."""

    path: Path
    kind: Kind

    def samples(self) -> Iterator[Sample]:
        """Samples in the order of their lines; blank lines, empty texts and answers that are equally good are left out."""
        for number, value in _objects(self.path):
            sample = _sample(value, f"{self.path} line {number}")
            if sample.kind != self.kind:
                raise DataError(
                    f"{self.path} line {number} is of another kind than {self.kind}: one file holds either texts "
                    '({"text"}), pairs ({"prompt", "answer"}) or preferences ({"prompt", "chosen", "rejected"}).'
                )
            if _says_something(sample):
                yield sample


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters, cut at a blank line, or at a line's end where there is none near."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            blank = text.find("\n\n", end, end + size)
            line = text.find("\n", end)
            end = blank + 2 if blank >= 0 else line + 1 if line >= 0 else len(text)
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end


def _kind_of(path: Path) -> Kind:
    for number, value in _objects(path):
        return _sample(value, f"{path} line {number}").kind
    raise DataError(
        f"{path} holds no sample. Each line is a JSON object with text, with prompt and answer, or with prompt, chosen and "
        "rejected."
    )


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{path} line {number} is not UTF-8 (byte {error.start + 1}).") from error
                except ValueError as error:
                    raise DataError(f"{path} line {number} is not valid JSON: {error}.") from error
                if not isinstance(value, dict):
                    raise DataError(f"{path} line {number} is a {type(value).__name__}; it must be a JSON object.")
                yield number, value
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


_SHAPES: tuple[tuple[tuple[str, ...], type[Text] | type[Pair] | type[Preference]], ...] = (
    (("prompt", "chosen", "rejected"), Preference),
    (("prompt", "answer"), Pair),
    (("input", "output"), Pair),
    (("text",), Text),
)


def _sample(value: dict[str, Any], where: str) -> Sample:
    for keys, kind in _SHAPES:
        if all(key in value for key in keys):
            for key in keys:
                if not isinstance(value[key], str):
                    raise DataError(f"{where}: {key!r} is a {type(value[key]).__name__}; it must be a string.")
            return kind(*(value[key] for key in keys))
    raise DataError(
        f"{where} has the keys {', '.join(map(str, value)) or '(none)'}; "
        'it needs "text", or "prompt" and "answer", or "input" and "output", or "prompt", "chosen" and "rejected".'
    )


def _says_something(sample: Sample) -> bool:
    match sample:
        case Text(text):
            return bool(text)
        case Pair(_, answer):
            return bool(answer.strip())
        case Preference(_, chosen, rejected):
            return bool(chosen.strip() and rejected.strip()) and chosen != rejected


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line} is not UTF-8. Convert it, or remove it from the corpus.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
