"""Config of a Kubernetes site: what its cluster wants of Tandem's pods. `kubernetes.yaml` in TANDEM_HOME, or `--site`."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass, field

from tandem.config import check
from tandem.errors import ConfigError

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A name of Kubernetes that can be part of a host name."""
MAX_NAME_CHARS = 47
"""Longest name of a RayService or RayJob: KubeRay appends to it."""
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")
"""Kubernetes' form of an amount, such as 500m, 4 or 16Gi."""
BINARY = ("K", "M", "G", "T", "P", "E")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class TolerationConfig:
    """A taint of nodes on which pods may run all the same."""

    key: str
    value: str | None = None
    """Unset: any value."""
    effect: str | None = None
    """`NoSchedule`, `PreferNoSchedule` or `NoExecute`; unset: all."""

    def __post_init__(self) -> None:
        if self.effect is not None:
            check.one_of("tolerations[].effect", self.effect, ("NoSchedule", "PreferNoSchedule", "NoExecute"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PodConfig:
    """What one kind of pods gets, and where it runs."""

    cpus: int = 4
    """CPUs that are requested; a pod may use more where the node has some free."""
    memory: str = "16Gi"
    """Memory that is requested, and the limit."""
    shared_memory: str = "4Gi"
    """Size of /dev/shm, where Ray keeps objects; part of `memory`."""
    scratch: str = "20Gi"
    """Space on the node's disk for temporary files, caches and Ray's logs. 80 % of it may be models by URI, and 10 % adapters."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that the node must have."""
    tolerations: tuple[TolerationConfig, ...] = ()

    def __post_init__(self) -> None:
        check.at_least("cpus", self.cpus, 1)
        for name in ("memory", "shared_memory", "scratch"):
            if not QUANTITY.fullmatch(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be an amount such as 16Gi.")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig(PodConfig):
    """One pool of workers: pods that are equal, each a node of the Ray cluster."""

    gpus: int = 0
    """GPUs of each pod."""
    min_replicas: int = 1
    max_replicas: int = 4

    def __post_init__(self) -> None:
        PodConfig.__post_init__(self)
        check.at_least("gpus", self.gpus, 0)
        check.at_least("min_replicas", self.min_replicas, 0)
        if self.max_replicas < max(1, self.min_replicas):
            raise ConfigError(
                f"max_replicas is {self.max_replicas}; it must be at least {max(1, self.min_replicas)} (min_replicas, and 1)."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesSite:
    """One Kubernetes cluster. The names are those of `deploy/kubernetes/base`; `--site-set` overrides single values."""

    context: str | None = None
    """Context of the kubeconfig; unset: the current one, or inside of a pod its service account."""
    namespace: str = "tandem"
    image: str = f"tandem:{importlib.metadata.version('tandem')}"
    """The container image with this version of Tandem."""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    """Secrets for the image's registry."""
    home_claim: str = "tandem-home"
    """PersistentVolumeClaim (ReadWriteMany) that holds TANDEM_HOME."""
    secrets: tuple[str, ...] = ("tandem-secrets",)
    """Secrets whose keys are variables in all pods: TANDEM_DATABASE_URL, keys of object stores, HF_TOKEN."""
    token_secret: str = "tandem-ray-token"
    """Secret with Ray's token as `auth_token`."""
    redis_address: str | None = "tandem-redis:6379"
    """Redis that keeps the state of Ray's head over a restart; null: a head that is lost takes its cluster with it."""
    redis_secret: str = "tandem-redis"
    """Secret with Redis' password as `password`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables in all pods."""
    gpu_resource: str = "nvidia.com/gpu"
    """Kubernetes' name of the GPUs."""
    runtime_class: str | None = None
    """RuntimeClass of pods with GPUs, where the cluster wants one."""
    idle_timeout_s: int = 600
    """Seconds after which the autoscaler ends a worker that nothing runs on."""
    train_retries: int = 3
    """How often a training job gets a new cluster after a failure; it resumes at its newest checkpoint."""
    train_time_limit_s: int | None = None
    """Seconds after which a training job is ended; unset: never."""
    head: PodConfig = field(default_factory=PodConfig)
    data: PoolConfig = field(default_factory=lambda: PoolConfig(min_replicas=0, cpus=8, memory="32Gi"))
    serve: PoolConfig = field(default_factory=lambda: PoolConfig(cpus=8, memory="32Gi", shared_memory="8Gi"))
    train: PoolConfig = field(default_factory=lambda: PoolConfig(cpus=8, memory="32Gi", shared_memory="8Gi"))

    def __post_init__(self) -> None:
        names = ("namespace", "home_claim", "token_secret", "redis_secret", "runtime_class")
        words = {name: (getattr(self, name),) for name in names} | {
            "secrets": self.secrets,
            "pull_secrets": self.pull_secrets,
        }
        for key, values in words.items():
            for value in values:
                if value is not None and not NAME.fullmatch(value):
                    raise ConfigError(f"{key} is {value!r}; it must be a name of small letters, digits and hyphens.")
        if not self.image or any(character.isspace() for character in self.image):
            raise ConfigError(
                f"image is {self.image!r}; it must name an image, such as registry.example.org/tandem:1.0."
            )
        check.one_of("pull_policy", self.pull_policy, ("Always", "IfNotPresent", "Never"))
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ConfigError(f"environment has {name!r}; that is no name of a variable.")
        if self.redis_address is not None and not re.fullmatch(r"[^\s:]+:\d+", self.redis_address):
            raise ConfigError(f"redis_address is {self.redis_address!r}; it must be HOST:PORT, or null.")
        check.at_least("idle_timeout_s", self.idle_timeout_s, 0)
        check.at_least("train_retries", self.train_retries, 0)
        if self.train_time_limit_s is not None:
            check.at_least("train_time_limit_s", self.train_time_limit_s, 1)


def in_gib(quantity: str) -> float:
    """An amount of bytes in Kubernetes' form, such as 20Gi or 500M, in GiB."""
    number = float(re.match(r"[\d.]+", quantity)[0])  # type: ignore[index] # checked by QUANTITY
    unit = quantity.lstrip("0123456789.")
    if unit.endswith("i"):
        factor = 1024.0 ** (1 + BINARY.index(unit[0]))
    else:
        factor = {"": 1.0, "m": 1e-3}.get(unit) or 1000.0 ** (1 + BINARY.index(unit.upper()))
    return number * factor / 2**30


def check_name(name: str) -> str:
    """The name of a RayService or RayJob; ConfigError if Kubernetes or KubeRay would refuse it."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_CHARS:
        raise ConfigError(
            f"--name is {name!r}; it must be at most {MAX_NAME_CHARS} small letters, digits and hyphens, and begin with a letter."
        )
    return name
