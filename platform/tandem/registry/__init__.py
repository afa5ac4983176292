"""What exists: models and adapters, versioned, with their lineage."""

from tandem.registry.base import Base, find_base
from tandem.registry.records import Kind, ModelRecord
from tandem.registry.store import Registry

__all__ = ["Base", "Kind", "ModelRecord", "Registry", "find_base"]
