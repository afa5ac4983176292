"""A batch run: which rows, answered by which model, with which settings, on what part of the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.config import check
from tandem.config.serve import ServedModelConfig
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """One batch run. What decides the answers may not change between a run and its continuation; where it runs may."""

    input: str
    """A file of rows (JSON lines, Parquet, WebDataset), a folder of such, a pattern with *, or a URI of one of these."""
    model: str
    """Who answers rows that name nobody: a registered model or adapter, or a folder in Hugging Face's format."""
    output: str
    """A folder, or a file that ends in .jsonl; also by URI."""
    request: dict[str, Any] = field(default_factory=dict)
    """Fields for rows that lack them, by OpenAI's and vLLM's names: max_tokens, temperature, ..."""
    rows_per_piece: int | None = None
    """Rows that are published together, and so lost together; unset: about 4,000 pieces, of 64 rows or more."""
    window_rows: int = 2048
    """Rows that one engine has at a time, those that wait among them: more than it can run at once, so that it never idles."""
    max_failures: int = 3
    """Times that one replica is started again after its process died."""
    engine: str = "vllm"
    """vllm, or echo (answers with the prompt; for tests of what surrounds an engine)."""
    replicas: int = 1
    """Engines that share the rows."""
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    resources_per_replica: dict[str, float] = field(default_factory=dict)
    """Other resources that Ray reserves for each replica, by the names that the cluster's nodes give them."""
    max_adapters: int = 8
    """Adapters that one replica answers with at once, where rows ask for so many."""
    max_cached_adapters: int | None = None
    """Adapters that one replica keeps in host memory; unset: four times max_adapters."""
    max_lora_rank: int = 64
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's own engine, by their names there."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the replicas."""

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
        self.served(self.model, adapters=0)

    def served(self, model: str, *, adapters: int) -> ServedModelConfig:
        """The settings of one base's replicas, as the served app has them, with room for the `adapters` that are asked for."""
        try:
            return ServedModelConfig(
                model=model,
                engine=self.engine,
                replicas=self.replicas,
                cpus_per_replica=self.cpus_per_replica,
                gpus_per_replica=self.gpus_per_replica,
                resources_per_replica=self.resources_per_replica,
                max_adapters=min(self.max_adapters, adapters),
                max_cached_adapters=self.max_cached_adapters,
                max_lora_rank=self.max_lora_rank,
                engine_args=self.engine_args,
                env=self.env,
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("models[].", "")) from error
