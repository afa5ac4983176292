"""Selection of the files of a hub repository to download. Pure: from the list of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from tandem.errors import HubError, did_you_mean
from tandem.registry.hub.reference import HubDataset, HubModel

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Weights in Python's pickle format, which runs code when it is read."""
KEPT_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken")
KEPT_NAMES = ("merges.txt", "vocab.txt", "modules.json")
EXCLUDED_NAMES = ("trainer_state.json", "training_args.json", "optimizer.json")
MAIN_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
MODULE_FOLDER = re.compile(r"\d+_\w+")
"""A layer's folder in a sentence-transformers model."""
TRAIN_SPLIT = re.compile(r"(^|[/_.-])train([/_.-]|$)")
"""In a path: a file of the training split."""
MAX_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class RepoFile:
    """A file of a repository at a commit."""

    path: str
    """In the repository, with forward slashes."""
    size: int
    """Bytes."""
    blob: str
    """git's id of it: sha1 over "blob SIZE", a zero byte and the content (of a large file: of its pointer)."""
    sha256: str | None = None
    """Of the content, where it is kept in large file storage."""

    @property
    def key(self) -> str:
        """Its name in the cache: the digest of its content."""
        return self.sha256 or self.blob


def model_files(ref: HubModel, files: Sequence[RepoFile]) -> list[RepoFile]:
    """Configs, tokenizer, chat templates and safetensors; HubError for a repository that holds no such model."""
    top_level = {file.path for file in files if "/" not in file.path}
    weights = [file for file in files if "/" not in file.path and file.path.endswith(".safetensors")]
    # Some repositories hold the same weights twice, in their maker's own layout too.
    weights = [file for file in weights if MAIN_WEIGHTS.fullmatch(file.path)] or weights
    if "config.json" not in top_level:
        if "adapter_config.json" in top_level:
            raise HubError(
                f"{ref} on the hub is an adapter, not a model (it holds adapter_config.json, no config.json). Download it with "
                f"`hf download {ref.repo} --local-dir FOLDER`, then `tandem adapters register NAME FOLDER --base MODEL`."
            )
        raise HubError(
            f"{ref} on the hub holds no config.json, so it is no transformers model. It holds {_listed(top_level)}. "
            f"{_converted(files)}"
        )
    if not weights:
        pickle_files = [file for file in files if file.path.endswith(PICKLE_SUFFIXES)]
        pickles = _listed(file.path for file in pickle_files)
        reason = (
            f"only weights in Python's pickle format ({pickles}), which runs code when it is read"
            if pickle_files
            else f"no *.safetensors at its top level (it holds {_listed(top_level)})"
        )
        raise HubError(f"{ref} on the hub holds {reason}; Tandem takes safetensors. {_converted(files)}")
    modules = "modules.json" in top_level
    return [file for file in files if file in weights or _is_kept(file.path, modules)]


def dataset_files(ref: HubDataset, files: Sequence[RepoFile], suffixes: tuple[str, ...]) -> list[RepoFile]:
    """The files of one sort that `ref.path` names; without a path those of the training split, or all if none is one.

    `suffixes`: endings of the files that can be read. HubError with what there is if none is left, or if it is not clear which.
    """
    readable = [file for file in files if file.path.endswith(suffixes)]
    if ref.path:
        selected = [file for file in readable if _matches(file.path, ref.path)]
        if not selected:
            suggestion = did_you_mean(ref.path, [*(file.path for file in readable), *_folders(readable)])
            raise HubError(
                f"The dataset {ref.repo} holds no file {ref.path} that can be read.{suggestion} It holds "
                f"{_listed(file.path for file in readable)}."
            )
    else:
        selected = readable
    if not selected:
        raise HubError(
            f"The dataset {ref.repo} at {ref.revision} holds no file that can be read ({', '.join(suffixes)}). It holds "
            f"{_listed(file.path for file in files)}. Where the hub has made Parquet files of it, they are at "
            f"{HubDataset(repo=ref.repo, revision='refs/convert/parquet')}."
        )
    if "*" not in ref.path:
        selected = [file for file in selected if TRAIN_SPLIT.search(file.path)] or selected
    folders = _folders(selected)
    if len(folders) > 1:
        raise HubError(
            f"The dataset {ref.repo} has files in {len(folders)} folders ({_listed(folders)}). Name one: "
            f"{HubDataset(repo=ref.repo, revision=ref.revision, path=folders[0])}."
        )
    suffixes_found = sorted({next(suffix for suffix in suffixes if file.path.endswith(suffix)) for file in selected})
    if len(suffixes_found) > 1:
        pattern = "/".join(filter(None, [folders[0], f"*{suffixes_found[0]}"]))
        raise HubError(
            f"The dataset {ref.repo} has files of {len(suffixes_found)} sorts ({', '.join(suffixes_found)}). Name one: "
            f"{HubDataset(repo=ref.repo, revision=ref.revision, path=pattern)}."
        )
    return sorted(selected, key=lambda file: file.path)


def _is_kept(path: str, modules: bool) -> bool:
    parsed = PurePosixPath(path)
    if parsed.name in EXCLUDED_NAMES:
        return False
    if parsed.parent == PurePosixPath("."):
        return parsed.name in KEPT_NAMES or parsed.suffix in KEPT_SUFFIXES
    if parsed.parts[0] == "additional_chat_templates":
        return parsed.suffix == ".jinja"
    return modules and bool(MODULE_FOLDER.fullmatch(parsed.parts[0])) and parsed.suffix in (".json", ".safetensors")


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) if "*" in pattern else path == pattern or path.startswith(f"{pattern}/")


def _folders(files: Iterable[RepoFile]) -> list[str]:
    return sorted({file.path.rpartition("/")[0] for file in files})


def _converted(files: Sequence[RepoFile]) -> str:
    if any(file.path.endswith(".gguf") for file in files):
        return "It holds GGUF files: name the repository that they were made from."
    return (
        "Name a repository with safetensors, or convert this one: load it with transformers and call save_pretrained()."
    )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return (
        ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")
        or "nothing"
    )
