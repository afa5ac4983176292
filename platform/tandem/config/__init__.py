"""What a person writes: frozen dataclasses, and the strict loader that turns YAML and `--set` into them."""

from tandem.config.autoscaling import AutoscalingConfig
from tandem.config.batch import BatchConfig
from tandem.config.data import DataConfig, MixturePart
from tandem.config.deepspeed import DeepSpeedConfig
from tandem.config.elastic import check_elastic, sized, sizes
from tandem.config.faults import FaultsConfig, SpikeConfig
from tandem.config.lines import located
from tandem.config.load import apply_overrides, from_dict, load_yaml, to_dict
from tandem.config.metrics import MetricsConfig, MlflowConfig, WandbConfig
from tandem.config.model import LoraConfig, ModelConfig
from tandem.config.objective import DpoConfig, EvaluationConfig
from tandem.config.optimizer import OptimizerConfig
from tandem.config.parallel import ParallelismConfig
from tandem.config.serve import GatewayConfig, ListenConfig, PrefillConfig, RouterConfig, ServeConfig, ServedModelConfig
from tandem.config.train import CheckpointConfig, TrainConfig

__all__ = [
    "AutoscalingConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DpoConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "GatewayConfig",
    "ListenConfig",
    "LoraConfig",
    "MetricsConfig",
    "MixturePart",
    "MlflowConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "PrefillConfig",
    "RouterConfig",
    "ServeConfig",
    "ServedModelConfig",
    "SpikeConfig",
    "TrainConfig",
    "WandbConfig",
    "apply_overrides",
    "check_elastic",
    "from_dict",
    "load_yaml",
    "located",
    "sized",
    "sizes",
    "to_dict",
]
