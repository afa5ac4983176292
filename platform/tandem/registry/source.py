"""Model references as users write them: a folder, a model of the Hugging Face hub, or a registered name.

`/x`, `./x`, `~/x`     a folder
`org/name`             a folder of that relative path if there is one, else a model of the hub
`org/name@revision`    the same at a branch, a tag or a commit; `org/name@3` is the third version that was registered of it
`hf://org/name`        a model of the hub, whatever lies in the current directory
`name`, `name@3`       a registered model or adapter
"""

from __future__ import annotations

from pathlib import Path

from tandem.errors import ConfigError, HubError, UnknownModelError, did_you_mean
from tandem.ids import is_hub_name, split_version
from tandem.registry.hub import HubModel, pull_model, restore
from tandem.registry.hub.reference import MODEL_FORM, SCHEME
from tandem.registry.records import ModelRecord
from tandem.registry.store import Registry

PATH_STARTS = ("/", ".", "~")
"""First characters of references that are always paths."""


def find_model(word: str, registry: Registry, key: str = "model") -> Path | ModelRecord:
    """The folder (absolute, with config.json) or the record that `word` names; a model of the hub is downloaded if need be.

    Raises ConfigError for a folder without a model, UnknownModelError with the nearest name, HubError, StorageError; each begins
    with `key`, the setting that named it.
    """
    if (folder := folder_of(word)) is not None:
        return checked_folder(
            folder, key, "" if word.startswith(PATH_STARTS) else f" A model of the hub is {MODEL_FORM}."
        )
    ref = HubModel.parse(word)
    if ref is None and word.startswith(SCHEME):
        raise ConfigError(f"{key}: {word!r} names no model of the hub. Its form is {SCHEME}{MODEL_FORM}.")
    try:
        if ref is not None:
            return pull_model(ref, registry)
        record = registry.resolve(word)
        if not record.path.is_dir() and record.uri is None:
            restore(record.path)
        return record
    except (UnknownModelError, HubError) as error:
        no_folder = f"There is no folder {Path(word)}. " if ref is not None and not word.startswith(SCHEME) else ""
        raise type(error)(f"{key}: {no_folder}{error}") from error


def folder_of(word: str) -> Path | None:
    """The folder that `word` names, there or not; None if it names something else."""
    folder = Path(word).expanduser()
    if word.startswith(PATH_STARTS):
        return folder.resolve()
    if "/" not in word or word.startswith(SCHEME):
        return None
    if folder.is_dir():
        return folder.resolve()
    return None if HubModel.parse(word) or is_hub_name(split_version(word)[0]) else folder.resolve()


def checked_folder(folder: Path, key: str, hint: str = "") -> Path:
    """The folder, if it holds a config.json; ConfigError with the nearest name, and with `hint`, otherwise."""
    if not (folder / "config.json").is_file():
        siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
        models = [sibling.name for sibling in siblings if sibling != folder and (sibling / "config.json").is_file()]
        suggestion = did_you_mean(folder.name, models)
        raise ConfigError(f"{key}: no model at {folder}: it has no config.json.{suggestion}{hint}")
    return folder


def called(word: str, registry: Registry) -> str:
    """The default name for clients of the model that `word` names; nothing is downloaded for a default revision."""
    if (folder := folder_of(word)) is not None:
        return folder.name
    ref = HubModel.parse(word)
    if ref is None:
        return word
    return ref.repo if str(ref) == ref.repo else pull_model(ref, registry).id
