"""Config of a batch run: input rows, model, request fields, output, replicas."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from tandem.config import check
from tandem.config.serving.app import ServedModelConfig
from tandem.config.serving.replica import ReplicaConfig
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig(ReplicaConfig):
    """One batch run. A continued run may change its resources, but no setting that the answers depend on.

    Its replicas share the rows, and have adapter slots only for the adapters that rows name, at most `max_adapters`.
    """

    input: str
    """A file of rows (JSON lines, Parquet, WebDataset), a folder of such, a pattern with *, or a URI of one of these."""
    model: str
    """Model for rows without a `model`: a registered model or adapter, a folder in Hugging Face's format, or `org/name` of its
    hub."""
    output: str
    """A folder, or a file that ends in .jsonl, which every node sees at that path; also by URI."""
    request: dict[str, Any] = field(default_factory=dict)
    """Default fields of requests, by OpenAI's and vLLM's names: max_tokens, temperature, ..."""
    chat: bool = False
    """Whether the `prompt` of a plain row is sent as a user's message, through the model's chat template."""
    rows_per_piece: int | None = None
    """Rows of one piece, which is published as a whole; unset: about 4,000 pieces of at most 65,536 rows and 64 MiB."""
    on_app: bool = False
    """Whether the rows are sent to the app that serves, as batches of `/v1/batches`, instead of to engines of the run's own."""
    window_rows: int = 2048
    """Running and waiting rows of one engine: more than it can run at once, so that it never idles."""
    max_failures: int = 3
    """Restarts of one replica after its process died."""

    def __post_init__(self) -> None:
        for key in ("input", "model", "output"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty. Say what is read, who answers, and where the answers go.")
        if self.rows_per_piece is not None:
            check.at_least("rows_per_piece", self.rows_per_piece, 1)
        check.at_least("window_rows", self.window_rows, 1)
        check.at_least("max_failures", self.max_failures, 0)
        for key in ("model", "stream"):
            if key in self.request:
                instead = "set model instead" if key == "model" else "an answer is written when it is whole"
                raise ConfigError(f"request.{key} cannot be set: {instead}.")
        for key in ("request", "engine_args"):
            try:
                json.dumps(getattr(self, key), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{key} has a value that JSON has no form for: {error}. Give it as text.") from None
        if self.on_app:
            self._check_on_app()
        self.served(self.model, adapters=0)

    def _check_on_app(self) -> None:
        """ConfigError for a setting of engines that are not the run's own."""
        names = (*(f.name for f in fields(ReplicaConfig)), "window_rows", "max_failures")
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        if changed := [name for name in names if getattr(self, name) != defaults[name]]:
            raise ConfigError(
                f"{' and '.join(changed)} cannot be set with on_app: the engines of the app are used as they are. Leave "
                f"{'it' if len(changed) == 1 else 'them'} out, or run without on_app."
            )

    def served(self, model: str, *, adapters: int) -> ServedModelConfig:
        """The settings of one base model's replicas in the served app's form, with slots for the `adapters` that rows name."""
        try:
            replica_settings = {f.name: getattr(self, f.name) for f in fields(ReplicaConfig)}
            return ServedModelConfig(
                **{**replica_settings, "model": model, "max_adapters": min(self.max_adapters, adapters)}
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("models[].", "")) from error
