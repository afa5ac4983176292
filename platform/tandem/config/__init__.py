"""Configuration: frozen dataclasses, and the strict loader that builds them from YAML and `--set`."""

from tandem.config.lines import located
from tandem.config.load import apply_overrides, from_dict, load_yaml, to_dict
from tandem.config.scheduling import (
    AmountsConfig,
    JobSchedulingConfig,
    SchedulingConfig,
    TenantShareConfig,
)
from tandem.config.serving.app import (
    GatewayConfig,
    ListenConfig,
    PrefillConfig,
    RouterConfig,
    ServeConfig,
    ServedModelConfig,
)
from tandem.config.serving.autoscaling import AutoscalingConfig
from tandem.config.serving.batch import BatchConfig
from tandem.config.serving.caps import RequestCaps
from tandem.config.serving.files import FilesConfig
from tandem.config.serving.oidc import OidcConfig
from tandem.config.serving.replica import AUTO_ENGINE
from tandem.config.serving.stored import StoredConfig
from tandem.config.serving.tls import TlsConfig
from tandem.config.serving.webhooks import WebhookConfig
from tandem.config.training.data import DataConfig, MixturePart
from tandem.config.training.deepspeed import DeepSpeedConfig
from tandem.config.training.elastic import check_elastic, with_at_most, with_workers, worker_counts
from tandem.config.training.faults import FaultsConfig, SpikeConfig
from tandem.config.training.job import CheckpointConfig, TrainConfig
from tandem.config.training.metrics import MetricsConfig, MlflowConfig, WandbConfig
from tandem.config.training.model import LoraConfig, ModelConfig
from tandem.config.training.objective import DpoConfig, EvaluationConfig
from tandem.config.training.optimizer import OptimizerConfig
from tandem.config.training.parallel import ParallelismConfig

__all__ = [
    "AUTO_ENGINE",
    "AmountsConfig",
    "AutoscalingConfig",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DpoConfig",
    "EvaluationConfig",
    "FaultsConfig",
    "FilesConfig",
    "GatewayConfig",
    "JobSchedulingConfig",
    "ListenConfig",
    "LoraConfig",
    "MetricsConfig",
    "MixturePart",
    "MlflowConfig",
    "ModelConfig",
    "OidcConfig",
    "OptimizerConfig",
    "ParallelismConfig",
    "PrefillConfig",
    "RequestCaps",
    "RouterConfig",
    "SchedulingConfig",
    "ServeConfig",
    "ServedModelConfig",
    "SpikeConfig",
    "StoredConfig",
    "TenantShareConfig",
    "TlsConfig",
    "TrainConfig",
    "WandbConfig",
    "WebhookConfig",
    "apply_overrides",
    "check_elastic",
    "from_dict",
    "load_yaml",
    "located",
    "with_at_most",
    "with_workers",
    "worker_counts",
    "to_dict",
]
