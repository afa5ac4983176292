"""Model config: a base model by name, or the shape of a new one; and LoRA."""

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
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get an adapter; unset: those of attention, and of the MLP unless it is experts."""
    dora: bool = False
    """Train the length of each row of a weight apart from its direction (DoRA, Liu et al. 2024). To be served, such an
    adapter is merged into its base first: `tandem models merge`."""
    quantize: str | None = None
    """nf4: the base is held in 4 bits (QLoRA, Dettmers et al. 2023; on a GPU, by bitsandbytes). Unset: as it is."""

    def __post_init__(self) -> None:
        check.between("lora.rank", self.rank, 1, 512)
        check.between("lora.dropout", self.dropout, 0.0, 0.99)
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError(
                "lora.target_modules is empty; name at least one linear layer, such as q_proj, or unset it."
            )
        if self.quantize is not None:
            check.one_of("lora.quantize", self.quantize, ("nf4",))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Either `base` (a model that exists), or the shape of a new model."""

    base: str | None = None
    """Base model to start from: a registered model, a folder with config.json and safetensors, or a model of the Hugging Face hub
    (`org/name`, `org/name@revision`)."""
    architecture: str = "llama"
    """Class of a new model: llama, qwen3, or qwen3_moe, whose MLPs are mixtures of experts."""
    tokenizer: str | None = None
    """Folder of a tokenizer for a new model; unset: the one that the dataset was built with."""
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    """Key/value heads shared by groups of query heads (GQA)."""
    intermediate_size: int = 512
    """Inner width of an MLP; qwen3_moe has `moe_intermediate_size` instead."""
    num_experts: int | None = None
    """qwen3_moe: experts of each layer."""
    experts_per_token: int | None = None
    """qwen3_moe: how many of them each token goes through."""
    moe_intermediate_size: int | None = None
    """qwen3_moe: inner width of one expert."""
    max_length: int = 512
    """Positions a sequence may have."""
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        check.one_of("model.architecture", self.architecture, ("llama", "qwen3", "qwen3_moe"))
        for key in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_length"):
            check.at_least(f"model.{key}", getattr(self, key), 1)
        check.divides("model.num_heads", self.num_heads, "model.hidden_size", self.hidden_size)
        check.divides("model.num_kv_heads", self.num_kv_heads, "model.num_heads", self.num_heads)
        if self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size / model.num_heads is {self.head_dim}; rotary positions need an even head width."
            )
        check.at_least("model.rope_theta", self.rope_theta, 1.0)
        self._check_experts()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def _check_experts(self) -> None:
        for key, such_as in (
            ("num_experts", 8),
            ("experts_per_token", 2),
            ("moe_intermediate_size", max(8, self.intermediate_size // 4)),
        ):
            value = getattr(self, key)
            if self.architecture != "qwen3_moe":
                if value is not None:
                    raise ConfigError(
                        f"model.{key} is {value}, but model.architecture is {self.architecture!r}, which has no experts. "
                        "Set model.architecture to 'qwen3_moe', or unset it."
                    )
            elif value is None:
                raise ConfigError(
                    f"model.architecture is 'qwen3_moe', but model.{key} is not set. Set it, such as {such_as}."
                )
            else:
                check.at_least(f"model.{key}", value, 1)
        if (
            self.num_experts is not None
            and self.experts_per_token is not None
            and self.experts_per_token > self.num_experts
        ):
            raise ConfigError(
                f"model.experts_per_token ({self.experts_per_token}) is more than model.num_experts ({self.num_experts}). "
                f"Lower it to {self.num_experts} at most."
            )
