"""Base model of a training job: a registered model, one of the Hugging Face hub, or a folder in its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.config.training.layout import ModelShape
from tandem.errors import ConfigError
from tandem.ids import folder_digest
from tandem.registry.folders import model_max_length, model_shape
from tandem.registry.records import ModelRecord
from tandem.registry.source import find_model
from tandem.registry.store import Registry


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """A model to start from."""

    id: str
    """`name@version`, or the folder of one that is not registered."""
    path: Path
    max_length: int | None
    """Positions that it was trained for (max_position_embeddings)."""
    record: ModelRecord | None
    """None for one that is not registered."""

    def shape(self) -> ModelShape:
        """Its layers by config.json; RegistryError if that cannot be read."""
        return model_shape(self.path)

    def digest(self) -> str:
        """sha256 over the folder's files; reads them all if the registry does not know it."""
        return self.record.digest if self.record else folder_digest(self.path)


def find_base(base: str, key: str = "model.base") -> BaseRef:
    """The model that the setting `key` names, in one of the forms of `source`; one of the hub is downloaded if need be.

    Raises UnknownModelError with the nearest name, ConfigError for an adapter, RegistryError for a folder without weights, and
    what `find_model` raises.
    """
    # A bare name may be a folder here, too.
    folder = Path(base).expanduser().resolve()
    model = folder if (folder / "config.json").is_file() else find_model(base, Registry.open(), key)
    if isinstance(model, Path):
        return BaseRef(id=str(model), path=model, max_length=model_max_length(model), record=None)
    if model.kind != "model":
        raise ConfigError(
            f"{key} is {model.id}, an adapter of {model.base}. Name the model itself, or merge them: "
            f"`tandem models merge {model.id} NEW_NAME`."
        )
    return BaseRef(id=model.id, path=model.path, max_length=model.max_length, record=model)
