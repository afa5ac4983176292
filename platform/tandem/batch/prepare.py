"""Preparation of a batch run: checks models, settings, input and output before anything starts.

Needs neither a cluster nor Ray, which reads how it authenticates when it is imported: not before there is a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from tandem.api.request_fields import REQUEST_FIELDS
from tandem.api.request_values import GENERATE_ROUTES, value_problems
from tandem.batch.input.plan import ChunkSize, WorkUnit, units
from tandem.batch.input.sources import find_files
from tandem.batch.input.survey import Grouping, Survey, survey
from tandem.batch.models import ModelResolver
from tandem.batch.output.manifest import Manifest
from tandem.batch.output.write import Output
from tandem.config import BatchConfig, ServedModelConfig
from tandem.engine.create import check_engine_args
from tandem.engine.engines import check_engine_name, select_engine
from tandem.engine.spec import EngineSpec
from tandem.errors import ConfigError, DataError, did_you_mean
from tandem.registry import Registry
from tandem.routing.records import ServedModel
from tandem.serve.engine_spec import engine_spec
from tandem.storage import Location


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run whose settings, input and output fit together."""

    config: BatchConfig
    output: Output
    manifest: Manifest
    survey: Survey

    @property
    def units(self) -> list[WorkUnit]:
        """All that is published, chunk by chunk."""
        return units(self.survey.chunks, self.survey.bases)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRun(PreparedRun):
    """A run with engines of its own: all that it asks for is there."""

    bases: tuple[tuple[EngineSpec, ServedModelConfig], ...]
    """Of each base what its engines load, and what Ray reserves for them."""
    names: ModelResolver


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedFiles:
    """Files of a run's input, and what an earlier start left in its output."""

    config: BatchConfig
    output: Output
    files: tuple[Location, ...]
    before: Manifest | None

    @property
    def checks_values(self) -> bool:
        """Whether rows with wrong values are refused."""
        return self.before is None or self.before.checks_values

    def survey(self, group: Grouping, size: ChunkSize | None, tell: Callable[[int], None]) -> Survey:
        """Read the input; `size` counts for a new run alone."""
        return survey(
            self.files,
            group,
            self.config.request,
            self.before.size if self.before else size,
            tell,
            chat=self.config.chat,
            check_values=self.checks_values,
        )

    def check(self, survey: Survey, models: Mapping[str, str | None]) -> tuple[Manifest, Survey]:
        """The run's manifest, and the survey in its order of bases; ConfigError if an earlier start had other rows or models."""
        manifest = Manifest.of(self.config, survey, models)
        if self.before is None:
            return manifest, survey
        self.before.check_input(manifest)
        return self.before, replace(survey, bases=self.before.order_bases(survey.bases))


def prepare(config: BatchConfig, tell: Callable[[int], None] = lambda rows: None) -> BatchRun:
    """Read the input and compare the run with what is in its output; `tell` hears how many rows have been read.

    Raises ConfigError, DataError, StorageError or a RegistryError with the next step.
    """
    check_engine_name(config.engine, "engine")
    checked = check_files(config)
    config, before = checked.config, checked.before
    names = ModelResolver(config, Registry.open(), before.models if before else {})
    size = ChunkSize(config.rows_per_piece) if config.rows_per_piece else None
    asked = checked.survey(Grouping(lambda row: names.find(row.model).base.id), size, tell)
    manifest, asked = checked.check(asked, names.resolved)
    bases = tuple(_base(config, names, each) for each in asked.bases)
    if config.engine_args and not (before and before.finished):
        check_engine_args(*(spec for spec, _ in bases))
    if before is None:
        checked.output.make()
    return BatchRun(config=config, output=checked.output, manifest=manifest, survey=asked, bases=bases, names=names)


def check_files(config: BatchConfig) -> CheckedFiles:
    """Check the request fields of a run, find its files, and compare its settings with those of an earlier start."""
    check_fields(config.request)
    found, output = find_files(config.input), Output.at(config.output)
    before = Manifest.read(output)
    if before is None or before.checks_values:
        check_request_values(config.request)
    if before is not None:
        config = before.with_engine(config)
        before.check_settings(config)
        if before.finished:
            output.check_made()
    # A run may write into the folder that it reads.
    files = tuple(file for file in found if not output.owns(file))
    if not files:
        raise DataError(
            f"{config.input} holds nothing but the output of this run. Give a file of rows, or another output."
        )
    return CheckedFiles(config=config, output=output, files=files, before=before)


def check_fields(request: Mapping[str, Any]) -> None:
    """ConfigError for a field that no request has, whatever its route."""
    known = frozenset[str]().union(*REQUEST_FIELDS.values())
    for field in request:
        if field not in known:
            raise ConfigError(f"request.{field} is not a field of any request.{did_you_mean(field, known)}")


def check_request_values(request: Mapping[str, Any]) -> None:
    """ConfigError for a value that no request can have."""
    # As rows have it: from Python, arrays may be tuples.
    asked = from_json(to_json(dict(request)))
    for path in GENERATE_ROUTES:
        for problem in value_problems(path, asked):
            raise ConfigError(f"request.{problem.field} {problem.text}.")


def _base(config: BatchConfig, names: ModelResolver, base: str) -> tuple[EngineSpec, ServedModelConfig]:
    model = next(t.base for t in (names.default, *names.targets.values()) if t.base.id == base)
    engine = select_engine(config.engine, Path(model.path), "engine")
    served = replace(config.served(model.id, adapters=names.adapters_of(base)), engine=engine.name)
    if engine.resources.placement(served, "the config").bundles:
        raise ConfigError(
            "engine_args.distributed_executor_backend is ray, and a batch's replicas are processes of one node. Leave it out."
        )
    spec = engine_spec(ServedModel(id=model.id, name=model.name, path=model.path, config=served))
    return replace(spec, offline=True), served
