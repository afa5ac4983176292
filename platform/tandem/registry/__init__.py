"""What exists: models and adapters, versioned and promoted, with their lineage."""

from tandem.registry.base import BaseRef, find_base
from tandem.registry.database import is_shared, upgrade
from tandem.registry.records import Kind, ModelRecord, Promotion, RegistryAddress
from tandem.registry.store import Registry, local_folder

__all__ = [
    "BaseRef",
    "Kind",
    "ModelRecord",
    "Promotion",
    "Registry",
    "RegistryAddress",
    "find_base",
    "is_shared",
    "local_folder",
    "upgrade",
]
