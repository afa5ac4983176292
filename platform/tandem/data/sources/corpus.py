"""Corpora: the standard library, text files, and files of records. Reading one twice gives the same samples.

Every bad line is a DataError that names its file and line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

from tandem.config import check
from tandem.data.index import INDEX_NAME, SHARDS_NAME, Kind
from tandem.data.sources import stdlib
from tandem.data.sources.records import READERS, arrow, reader_of, saved_dataset
from tandem.data.sources.samples import Pair, Preference, Sample, Text, sample_of
from tandem.errors import DataError, did_you_mean
from tandem.registry.hub import DatasetFiles, HubDataset, pull_dataset
from tandem.registry.hub.reference import DATASETS

TEXT_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = tuple(suffix for group in READERS for suffix in group)
KINDS = ("auto", *get_args(Kind))
BUILT_IN = ("stdlib", "stdlib-docstrings", "stdlib-preferences")


class Corpus(Protocol):
    """A source of samples of one kind."""

    @property
    def kind(self) -> Kind:
        """text, pairs, chats or preferences."""
        ...

    def samples(self) -> Iterator[Sample]:
        """The samples from the first; the same at each call."""
        ...


def open_corpus(source: str, kind: str = "auto") -> Corpus:
    """The corpus that `source` names: one of BUILT_IN, a file or a folder of files.

    Files are text (TEXT_SUFFIXES) or hold records (`records.READERS`). A folder holds data files of one sort, or is a dataset
    that Hugging Face's `datasets` saved. `hf://datasets/org/name` is one of its hub, whose files are downloaded if need be.
    Raises DataError if there is none, or if it is not of the `kind` asked for (auto, text, pairs, chats or preferences).
    """
    check.one_of("kind", kind, KINDS)
    corpus = _open(source)
    if kind not in ("auto", corpus.kind):
        raise DataError(f"{source} holds {corpus.kind}, and kind is {kind}. Leave kind out, or give another source.")
    return corpus


def _open(source: str) -> Corpus:
    if source == "stdlib":
        return StdlibTexts()
    if source == "stdlib-docstrings":
        return StdlibQuestions()
    if source == "stdlib-preferences":
        return StdlibPreferences()
    if source.startswith(DATASETS):
        files = pull_files(source).paths
        return TextFiles(files) if files[0].name.endswith(TEXT_SUFFIXES) else Records.of(files)
    path = Path(source).expanduser()
    suffixes = ", ".join([*TEXT_SUFFIXES, *RECORD_SUFFIXES])
    if path.is_dir():
        record_files = _record_files(path)
        return Records.of(record_files) if record_files is not None else TextFolder(path)
    if not path.exists():
        candidates = [*BUILT_IN, *_readable(path.parent)] if path.parent.is_dir() else list(BUILT_IN)
        raise DataError(
            f"No corpus at {source}.{did_you_mean(path.name, candidates)} Give a file ({suffixes}), "
            f"a folder of such files, or one of {', '.join(BUILT_IN)}."
        )
    if reader_of(path) is not None:
        return Records.of((path,))
    if path.suffix in TEXT_SUFFIXES:
        return TextFile(path)
    raise DataError(f"{source} is a {path.suffix or 'file without suffix'}; known are {suffixes}.")


def _readable(folder: Path) -> list[str]:
    """Names in a folder of files that can be a source, and of folders that hold some."""

    def readable(path: Path) -> bool:
        return path.is_file() and (path.suffix in TEXT_SUFFIXES or reader_of(path) is not None)

    return [p.name for p in folder.iterdir() if readable(p) or (p.is_dir() and any(map(readable, p.iterdir())))]


def pull_files(source: str) -> DatasetFiles:
    """The files of a dataset of the hub, downloaded if need be: `[hf://datasets/]org/name[@revision][/path]`.

    Of its text files only .txt: repositories have notes and scripts, too. Errors as `registry.hub.pull_dataset`.
    """
    return pull_dataset(HubDataset.parse(source), (*RECORD_SUFFIXES, TEXT_SUFFIXES[0]))


def pinned_source(source: str) -> str:
    """The source with its current commit, if it is a dataset of the hub (downloaded if need be); any other as it is."""
    return str(pull_files(source).ref) if source.startswith(DATASETS) else source


def _record_files(folder: Path) -> tuple[Path, ...] | None:
    """The files of records in a folder, or in its subfolder `data`; None if there are none, DataError if of two sorts."""
    arrow_files = saved_dataset(folder)
    if arrow_files is not None:
        return tuple(arrow_files)
    if (folder / INDEX_NAME).exists():
        folder = folder / SHARDS_NAME
    files = sorted(
        p for position in (folder, folder / "data") if position.is_dir() for p in position.iterdir() if p.is_file()
    )
    files_and_readers = [(p, reader_of(p)) for p in files]
    record_files = tuple(p for p, reader in files_and_readers if reader is not None)
    example_by_reader = {reader: p for p, reader in files_and_readers if reader is not None}
    if len(example_by_reader) > 1:
        raise DataError(
            f"{folder} holds files of {len(example_by_reader)} sorts "
            f"({', '.join(p.name for p in example_by_reader.values())}). Give one of them, or a folder of one sort."
        )
    text_files = [p for p in files if p.suffix == TEXT_SUFFIXES[0]]
    if record_files and text_files:
        raise DataError(
            f"{folder} holds {_count_files(record_files)} of records ({_example_names(record_files)}) and "
            f"{_count_files(text_files)} of text ({_example_names(text_files)}), and a dataset is made of one sort. "
            "Give one of the files, or move each sort into a folder of its own."
        )
    return record_files or None


def _count_files(files: Sequence[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) != 1 else ''}"


def _example_names(files: Sequence[Path]) -> str:
    return ", ".join(p.name for p in files[:3]) + (", ..." if len(files) > 3 else "")


class FolderFiles(NamedTuple):
    """The files of a source that is a folder."""

    read: tuple[Path, ...]
    skipped: tuple[Path, ...]
    """Files of other sorts, such as a README beside records; hidden ones are not among them."""


def folder_files(source: str) -> FolderFiles | None:
    """Which files of a folder are read; None for another source, and for a folder that `tandem` or `datasets` has written."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / INDEX_NAME).exists() or saved_dataset(folder) is not None:
        return None
    read = _record_files(folder) or text_files(folder)
    names = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    every = sorted(folder / name for name in names if not any(part.startswith(".") for part in name.parts))
    return FolderFiles(read, tuple(p for p in every if p not in set(read)))


def text_files(folder: Path) -> tuple[Path, ...]:
    """The text files below a folder, in the order of their paths."""
    return tuple(sorted(p for p in folder.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()))


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
    """Questions about functions of the standard library; the answers are from their docstrings."""

    kind: Kind = "pairs"

    def samples(self) -> Iterator[Sample]:
        """Questions, those of the best known modules first."""
        for prompt, answer in stdlib.questions():
            yield Pair(prompt, answer)


@dataclass(frozen=True)
class StdlibPreferences:
    """Questions about functions of the standard library: the answer of the function is preferred to that of another one."""

    kind: Kind = "preferences"

    def samples(self) -> Iterator[Sample]:
        """Questions in the order of StdlibQuestions; the worse answer is that of the question after."""
        questions = list(stdlib.questions())
        for (prompt, chosen), (_, rejected) in zip(questions, [*questions[1:], *questions[:1]], strict=True):
            yield Preference(prompt, chosen, rejected)


@dataclass(frozen=True)
class TextFile:
    """A text file, cut at blank lines so that even a small one gives many shards."""

    path: Path
    kind: Kind = "text"

    def samples(self) -> Iterator[Sample]:
        """Pieces in order."""
        text = _read_text(self.path)
        yield from (Text(piece) for piece in split_text(text, max(512, min(64 * 1024, len(text) // 64))))


@dataclass(frozen=True)
class TextFolder:
    """Every text file below a folder, a file a document."""

    path: Path
    kind: Kind = "text"

    def samples(self) -> Iterator[Sample]:
        """Files in the order of their paths."""
        yield from TextFiles(text_files(self.path)).samples()


@dataclass(frozen=True)
class TextFiles:
    """Some text files, a file a document."""

    paths: tuple[Path, ...]
    kind: Kind = "text"

    def samples(self) -> Iterator[Sample]:
        """Files in their order."""
        for path in self.paths:
            yield from (Text(piece) for piece in split_text(_read_text(path), 64 * 1024))


@dataclass(frozen=True)
class Records:
    """Files whose records are samples, one kind in all of them."""

    paths: tuple[Path, ...]
    kind: Kind

    @classmethod
    def of(cls, paths: tuple[Path, ...]) -> Records:
        """The corpus in these files, of the kind of its first record; DataError if there is none."""
        for path in paths:
            for location, record in _records(path):
                return cls(paths, sample_of(record, location).kind)
        raise DataError(
            f"{paths[0] if paths else 'The dataset'} holds no sample. A record has text, or prompt and answer, or messages, or "
            "prompt, chosen and rejected."
        )

    def samples(self) -> Iterator[Sample]:
        """Samples in the order of their files; empty ones, and answers that are equally good, are left out."""
        for path in self.paths:
            for location, record in _records(path):
                sample = sample_of(record, location)
                if sample.kind != self.kind:
                    raise DataError(
                        f'{location} is of another kind than {self.kind}: a corpus holds either texts ({{"text"}}), pairs '
                        '({"prompt", "answer"}), chats ({"messages"}) or preferences ({"prompt", "chosen", "rejected"}).'
                    )
                if sample.useful:
                    yield sample


def _records(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    reader = reader_of(path) or arrow
    return reader(path)


def split_text(text: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters, cut at a blank line, or at a line's end where there is none near."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            blank_line = text.find("\n\n", end, end + size)
            line = text.find("\n", end)
            end = blank_line + 2 if blank_line >= 0 else line + 1 if line >= 0 else len(text)
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line} is not UTF-8. Convert it, or remove it from the corpus.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
