"""References to the Hugging Face hub, parsed. Pure.

Models: `org/name`, `org/name@revision`, each also with `hf://` in front. A revision is a branch, a tag or a commit.
Datasets: `hf://datasets/org/name@revision/path`, as in huggingface_hub's file system: a slash in a revision is written `%2F`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote

from tandem.errors import DataError
from tandem.ids import is_hub_name, split_version

SCHEME = "hf://"
DATASETS = "hf://datasets/"
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")


MODEL_FORM = "org/name, or org/name@ and a branch, a tag or a commit: Qwen/Qwen3-0.6B@main"
"""How a model of the hub is named, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A model repository at a revision."""

    repo: str
    """`org/name`."""
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The model that `text` names; None if it has another form, `org/name@3` (a version of the registry) among them."""
        name = text.removeprefix(SCHEME)
        if split_version(name)[1] is not None:
            return None
        repo, at, revision = name.partition("@")
        if not is_hub_name(repo) or (at and not REVISION.fullmatch(revision)):
            return None
        return cls(repo=repo, revision=revision or DEFAULT_REVISION)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """A dataset repository at a revision, and which of its files."""

    repo: str
    """`org/name`."""
    revision: str = DEFAULT_REVISION
    path: str = ""
    """A file, a folder or a pattern with * in the repository; empty: chosen by `selection.dataset_files`."""

    def __str__(self) -> str:
        at = "" if self.revision == DEFAULT_REVISION else f"@{quote(self.revision, safe='')}"
        return f"{DATASETS}{self.repo}{at}" + (f"/{self.path}" if self.path else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The dataset that `hf://datasets/org/name[@revision][/path]`, or `org/name[@revision]`, names; DataError otherwise."""
        org, _, path_parts = text.removeprefix(DATASETS).partition("/")
        name, _, path = path_parts.partition("/")
        name, at, revision = name.partition("@")
        revision = unquote(revision)
        repo = f"{org}/{name}"
        if not is_hub_name(repo) or (at and not REVISION.fullmatch(revision)):
            raise DataError(
                f"{text!r} names no dataset of the hub. Its form is {DATASETS}org/name, with @revision after the name and a "
                "/path of files if need be."
            )
        return cls(repo=repo, revision=revision or DEFAULT_REVISION, path=path.strip("/"))
