"""Manifest of a batch run: settings and input by digest; decides whether another start may continue it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from tandem.batch.input.plan import ChunkSize
from tandem.batch.input.survey import Survey
from tandem.batch.output.write import Output
from tandem.config import AUTO_ENGINE, BatchConfig
from tandem.errors import ConfigError

FORMAT = 4
FORMATS = (1, 2, 3, 4)
"""Formats of runs that can be resumed. 1: chunks are divided by rows only. 1 and 2: the values of rows are not checked. 1 to 3:
runs on an app are not known."""
DECIDING = ("model", "engine", "request", "engine_args", "chat", "on_app")
"""Settings that the answers depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AppBatch:
    """A batch of a run on an app."""

    units: tuple[str, ...]
    """Names of the units whose rows it asks."""
    key: str
    """Hash of a random number and of the content: the idempotency key of its creation."""
    file: str
    """Id of its input file at the app."""
    id: str | None = None
    """At the app; None: it may have been created, and the app has not been heard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A run, as it lies beside its chunks."""

    settings: Mapping[str, Any]
    """Those that the answers depend on."""
    input: tuple[tuple[str, str], ...]
    """Files and their digests, in order."""
    rows: int
    rows_per_piece: int
    bytes_per_piece: int | None = None
    """Where a chunk is cut that has fewer rows than that; None: nowhere."""
    models: Mapping[str, str | None]
    """What each name in a row means, by id; None: nobody."""
    bases: tuple[str, ...]
    """Ids of the base models."""
    app_batches: tuple[AppBatch, ...] = ()
    """Of a run on an app those whose answers are not published yet."""
    finished: bool = False
    answered: int = 0
    failed: int = 0
    format: int = field(default=FORMAT)

    @classmethod
    def of(cls, config: BatchConfig, survey: Survey, models: Mapping[str, str | None]) -> Self:
        """What a new run writes down; `models`: what each name in a row means."""
        return cls(
            settings=_deciding(config),
            input=tuple(zip(map(str, survey.files), survey.digests, strict=True)),
            rows=survey.rows,
            rows_per_piece=survey.size.rows,
            bytes_per_piece=survey.size.bytes,
            models=models,
            bases=survey.bases,
        )

    @classmethod
    def read(cls, output: Output) -> Self | None:
        """What the run that wrote to this output wrote down; None if there was none."""
        found = output.manifest()
        if found is None:
            return None
        if found.get("format") not in FORMATS:
            raise ConfigError(
                f"{output.run} was written by another version of Tandem (format {found.get('format')}, not {FORMAT}). Choose "
                "another output."
            )
        found["input"] = tuple(tuple(each) for each in found["input"])
        found["app_batches"] = tuple(
            AppBatch(**{**each, "units": tuple(each["units"])}) for each in found.get("app_batches", ())
        )
        return cls(**{**found, "bases": tuple(found["bases"])})

    @property
    def checks_values(self) -> bool:
        """Whether rows with wrong values are refused; in runs of older releases they are not, in any of their starts."""
        return self.format >= 3

    @property
    def size(self) -> ChunkSize:
        """When a chunk is full."""
        return ChunkSize(self.rows_per_piece, self.bytes_per_piece)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def with_engine(self, config: BatchConfig) -> BatchConfig:
        """The config with the run's own engine where it names none: runs of older releases were recorded with `vllm`."""
        return replace(config, engine=self.settings["engine"]) if config.engine == AUTO_ENGINE else config

    def check_settings(self, config: BatchConfig) -> None:
        """ConfigError if the answers would be others than those that are there."""
        for key, now in _deciding(config).items():
            # Runs of before had no `chat`, and asked prompts as they are; nor could they use an app.
            before = self.settings.get(key, False)
            if before != now:
                raise ConfigError(
                    f"The run in {config.output} has {key} = {before!r}, and this one {now!r}. Give it that again to "
                    "resume, or choose another output."
                )
        if config.rows_per_piece not in (None, self.rows_per_piece):
            raise ConfigError(
                f"The run in {config.output} has rows_per_piece = {self.rows_per_piece}, and this one {config.rows_per_piece}. "
                "Leave it out to resume, or choose another output."
            )

    def check_input(self, now: Manifest) -> None:
        """ConfigError if the input or the model are not what they were."""
        # Where the files lie does not matter, what is in them does.
        if [digest for _, digest in self.input] != [digest for _, digest in now.input]:
            changed = [file for file, digest in now.input if digest not in {known for _, known in self.input}]
            raise ConfigError(
                f"The input is not the one that the run began with: it had {len(self.input)} files with {self.rows} rows, now "
                f"{len(now.input)} with {now.rows}; {', '.join(changed[:3]) or 'a file is gone, or their order'} changed. "
                "Choose another output."
            )
        for name, meant in self.models.items():
            if now.models.get(name, meant) != meant:
                raise ConfigError(
                    f"The model at {name} is not the one that the run began with: its files have changed. Choose another output."
                )

    def order_bases(self, found: Iterable[str]) -> tuple[str, ...]:
        """The bases that rows are for, in the run's order: names of published units have their places in it."""
        now = tuple(found)
        if gone := [base for base in self.bases if base not in now]:
            raise ConfigError(
                f"The run began with rows for the model {gone[0]}, and no row is for it now. Choose another output."
            )
        return (*self.bases, *(base for base in now if base not in self.bases))


def _deciding(config: BatchConfig) -> dict[str, Any]:
    """The settings that the answers depend on, as JSON gives them back: keys are text there, and a tuple is a list."""
    return dict(json.loads(json.dumps({key: getattr(config, key) for key in DECIDING})))
