"""Registry of models and adapters: versions, promotions and lineage."""

from tandem.db.database import is_shared, upgrade
from tandem.registry.base import BaseRef, find_base
from tandem.registry.hub import HubModel, pull_model, restore
from tandem.registry.records import Kind, ModelRecord, Promotion, RegistryAddress
from tandem.registry.rows import local_folder
from tandem.registry.source import called, find_model
from tandem.registry.store import Registry

__all__ = [
    "BaseRef",
    "HubModel",
    "Kind",
    "ModelRecord",
    "Promotion",
    "Registry",
    "RegistryAddress",
    "called",
    "find_base",
    "find_model",
    "is_shared",
    "local_folder",
    "pull_model",
    "restore",
    "upgrade",
]
