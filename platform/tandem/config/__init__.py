"""What a person writes: frozen dataclasses, and the strict loader that turns YAML and `--set` into them."""

from tandem.config.data import DataConfig
from tandem.config.deepspeed import DeepSpeedConfig
from tandem.config.load import apply_overrides, from_dict, load_yaml, to_dict
from tandem.config.metrics import MetricsConfig, MlflowConfig, WandbConfig
from tandem.config.model import LoraConfig, ModelConfig
from tandem.config.objective import DpoConfig, EvaluationConfig
from tandem.config.optimizer import OptimizerConfig
from tandem.config.parallel import ParallelismConfig
from tandem.config.serve import GatewayConfig, ServeConfig, ServedModelConfig
from tandem.config.train import CheckpointConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DpoConfig",
    "EvaluationConfig",
    "GatewayConfig",
    "LoraConfig",
    "MetricsConfig",
    "MlflowConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "ServeConfig",
    "ServedModelConfig",
    "TrainConfig",
    "WandbConfig",
    "apply_overrides",
    "from_dict",
    "load_yaml",
    "to_dict",
]
