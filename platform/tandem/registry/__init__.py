"""What exists: models and adapters, versioned, with their lineage."""

from tandem.registry.records import Kind, ModelRecord
from tandem.registry.store import Registry

__all__ = ["Kind", "ModelRecord", "Registry"]
