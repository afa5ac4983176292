"""What exists: models and adapters, versioned, with their lineage."""

from tandem.registry.base import BaseRef, find_base
from tandem.registry.records import Kind, ModelRecord
from tandem.registry.store import Registry

__all__ = ["BaseRef", "Kind", "ModelRecord", "Registry", "find_base"]
