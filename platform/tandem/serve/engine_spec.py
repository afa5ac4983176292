"""What the engine of a served model loads. Needs no Ray, so that settings can be checked where there is none yet."""

from __future__ import annotations

from tandem.engine.spec import EngineSpec
from tandem.routing.records import ServedModel
from tandem.serve.placement import workers


def engine_spec(model: ServedModel, where: str = "engine_args") -> EngineSpec:
    """What the engine of a served model loads; `where` its arguments stand in the app's config."""
    config = model.config
    return EngineSpec(
        kind=config.engine,
        id=model.id,
        name=model.name,
        path=model.path,
        max_adapters=config.max_adapters,
        max_cached_adapters=config.cached_adapters,
        max_lora_rank=config.max_lora_rank,
        threads=max(1, int(config.cpus_per_replica / workers(config.engine_args))),
        gpus=config.gpus_per_replica,
        args=config.engine_args,
        where=where,
    )
