"""Corpus of the Python standard library: sources, and questions made from docstrings. No code is imported or run."""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "ensurepip",
    "pydoc_data",
}
WELL_KNOWN = (
    "os.path", "os", "shutil", "json", "random", "statistics", "textwrap", "glob", "fnmatch", "tempfile", "bisect", "heapq",
    "string", "functools", "contextlib", "copy", "datetime", "calendar", "ast", "tokenize", "linecache",
    "traceback", "warnings", "subprocess", "threading", "queue", "socket", "ssl", "http.client", "urllib.parse",
    "urllib.request", "email.utils", "base64", "hmac", "secrets", "gzip", "bz2", "lzma", "zipfile", "tarfile", "csv",
    "configparser", "logging", "getpass", "platform", "locale", "gettext", "argparse", "asyncio.tasks", "asyncio.runners",
    "collections", "dataclasses", "enum", "fractions", "decimal", "numbers", "operator", "pickle", "pprint", "re", "reprlib",
    "inspect", "sched", "selectors", "shelve", "shlex", "signal", "stat", "struct", "timeit", "types", "typing", "uuid",
    "weakref",
)  # fmt: skip
"""Modules whose questions come first."""
ANSWER_LENGTH = (16, 64)
"""Characters of an answer, least and most: a model of a few million parameters learns these word for word."""
QUESTIONS = 96
"""Number of questions: such a model learns these word for word in a minute."""


def folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files() -> list[Path]:
    """The library's own sources, without tests, in the order of their paths."""
    root = folder()
    return sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))


def read_source(path: Path) -> str:
    """The text of a source file; bytes that are not UTF-8 are replaced."""
    return path.read_text(encoding="utf-8", errors="replace")


def questions() -> Iterator[tuple[str, str]]:
    """(question, answer): "What does os.path.join do?" and the first sentence of its docstring; each question once.

    Answers that several functions share are left out, since a question must have one right answer.
    """
    answer_by_question: dict[str, str] = {}
    for module in _modules():
        for name, sentence in _sentences(module):
            answer_by_question.setdefault(f"What does {module}.{name} do?", sentence)
    answers = list(answer_by_question.values())
    unique = ((question, answer) for question, answer in answer_by_question.items() if answers.count(answer) == 1)
    yield from itertools.islice(unique, QUESTIONS)


def _modules() -> list[str]:
    root = folder()
    module_names = []
    for path in source_files():
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part.startswith("_") for part in parts) and len(parts) <= 2:
            module_names.append(".".join(parts))
    return list(
        dict.fromkeys(
            [
                *WELL_KNOWN,
                *(name for name in module_names if name not in ("posixpath", "ntpath", "this", "antigravity")),
            ]
        )
    )


def _sentences(module: str) -> Iterator[tuple[str, str]]:
    base = folder() / ("posixpath" if module == "os.path" else module.replace(".", "/"))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.exists():
        return
    try:
        tree = ast.parse(read_source(path))
    except (SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            sentence = first_sentence(ast.get_docstring(node) or "")
            if sentence and ANSWER_LENGTH[0] <= len(sentence) <= ANSWER_LENGTH[1]:
                yield node.name, sentence


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line, or None if it has no plain one."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    match = re.match(r"[A-Z][^.:!?]*\.(?=\s|$)", paragraph)
    return match.group(0) if match and match.group(0).isascii() and ">>>" not in match.group(0) else None
