"""Engine spec of a served model: its files, names, adapter limits, threads and arguments. Needs no Ray."""

from __future__ import annotations

from tandem.engine.engines import find_engine
from tandem.engine.spec import EngineSpec
from tandem.routing.records import ServedModel


def engine_spec(model: ServedModel, where: str = "engine_args") -> EngineSpec:
    """The spec of a served model's engine; `where`: the place of its arguments in the config, for messages."""
    config = model.config
    num_workers = find_engine(config.engine).resources.num_workers(config.engine_args)
    return EngineSpec(
        kind=config.engine,
        id=model.id,
        name=model.name,
        path=model.path,
        max_adapters=config.max_adapters,
        max_cached_adapters=config.cached_adapters,
        max_lora_rank=config.max_lora_rank,
        threads=max(1, int(config.cpus_per_replica / num_workers)),
        gpus=config.gpus_per_replica,
        args=config.engine_args,
        where=where,
    )
