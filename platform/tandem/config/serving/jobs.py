"""Config of the jobs in an app's database."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsConfig:
    """Jobs of every kind that the app's dispatcher runs."""

    keep_days: float | None = 90.0
    """Days after its end for which a job is kept in the database, with its events and requests; null: for ever. Its folder, its
    files and its models stay."""

    def __post_init__(self) -> None:
        if self.keep_days is not None and not self.keep_days >= 1:
            raise ConfigError(
                f"jobs.keep_days is {self.keep_days}; it must be at least 1, or null to keep jobs for ever."
            )
