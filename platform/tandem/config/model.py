"""The model to train: a new one by its shape, or one that exists by its name."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), by peft."""

    rank: int = 16
    """Inner width of each adapter; vLLM takes 1, 8, 16, 32, 64, 128, 256, 320 and 512 as its largest."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""

    def __post_init__(self) -> None:
        check.between("lora.rank", self.rank, 1, 512)
        check.between("lora.dropout", self.dropout, 0.0, 0.99)
        if not self.target_modules:
            raise ConfigError("lora.target_modules is empty; name at least one linear layer, such as q_proj.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Either `base` (a registered name or a folder in Hugging Face's format), or the shape of a new model."""

    base: str | None = None
    """A registered model, or a folder with config.json and safetensors, to start from."""
    architecture: str = "llama"
    """Class of a new model: llama or qwen3."""
    tokenizer: str | None = None
    """Folder of a tokenizer for a new model; unset: the one that the dataset was built with."""
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    """Key/value heads shared by groups of query heads (GQA)."""
    intermediate_size: int = 512
    max_length: int = 512
    """Positions a sequence may have."""
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        check.one_of("model.architecture", self.architecture, ("llama", "qwen3"))
        for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_length"):
            check.at_least(f"model.{key}", getattr(self, key), 1)
        check.divides("model.num_heads", self.num_heads, "model.hidden_size", self.hidden_size)
        check.divides("model.num_kv_heads", self.num_kv_heads, "model.num_heads", self.num_heads)
        if self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size / model.num_heads is {self.head_dim}; rotary positions need an even head width."
            )
        check.at_least("model.rope_theta", self.rope_theta, 1.0)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads
