"""What exists: models and adapters, versioned and promoted, with their lineage."""

from tandem.registry.base import BaseRef, find_base
from tandem.registry.records import Kind, ModelRecord, Promotion
from tandem.registry.store import Registry, local_folder

__all__ = ["BaseRef", "Kind", "ModelRecord", "Promotion", "Registry", "find_base", "local_folder"]
