"""Files of a served model on a replica's node: those in an object store are brought here first."""

from __future__ import annotations

from dataclasses import replace

from tandem.errors import EngineError
from tandem.registry.model_cache import ModelCache, describe
from tandem.routing.records import ServedModel


def with_files(model: ServedModel) -> ServedModel:
    """The model with a `path` on this node.

    EngineError where the store holds other files than when the app was deployed: replicas of one version would differ.
    """
    if model.uri is None:
        return model
    cache = ModelCache.open()
    # A node that has the files needs no store to start another replica.
    if (here := cache.use(model.fingerprint)) is not None:
        return replace(model, path=str(here))
    remote = describe(model.uri)
    if remote.fingerprint != model.fingerprint:
        raise EngineError(
            f"{model.uri} has changed since the app was deployed. Deploy the app again: all replicas then get the new files."
        )
    return replace(model, path=str(cache.fetch(remote)))
