"""The model that a training starts from: a registered one, or any folder in Hugging Face's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.config.layout import ModelShape
from tandem.errors import ConfigError, UnknownModelError
from tandem.ids import folder_digest
from tandem.registry.folders import model_max_length, model_shape
from tandem.registry.records import ModelRecord
from tandem.registry.store import Registry


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """A model to start from."""

    id: str
    """`name@version`, or the folder of one that is not registered."""
    path: Path
    max_length: int | None
    """The positions that it was made for."""
    record: ModelRecord | None
    """None for one that is not registered."""

    def shape(self) -> ModelShape:
        """What its config.json says of its layers; RegistryError if that cannot be read."""
        return model_shape(self.path)

    def digest(self) -> str:
        """sha256 over the folder's files; reads them all if the registry does not know it."""
        return self.record.digest if self.record else folder_digest(self.path)


def find_base(base: str, key: str = "model.base") -> BaseRef:
    """The model that the setting `key` names: a folder with config.json, a `name@version`, or a name's newest version.

    Raises UnknownModelError with the nearest name, ConfigError for an adapter, RegistryError for a folder without weights.
    """
    folder = Path(base).expanduser().resolve()
    if (folder / "config.json").is_file():
        return BaseRef(id=str(folder), path=folder, max_length=model_max_length(folder), record=None)
    try:
        record = Registry.open().resolve(base)
    except UnknownModelError as error:
        raise UnknownModelError(f"{key}: {error}") from error
    if record.kind != "model":
        raise ConfigError(
            f"{key} is {record.id}, an adapter of {record.base}. Name the model itself, or merge them: "
            f"`tandem models merge {record.id} NEW_NAME`."
        )
    return BaseRef(id=record.id, path=record.path, max_length=record.max_length, record=record)
