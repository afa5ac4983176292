"""Config of a served app: models with replicas and engine settings, gateway, router, listener."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.config import check
from tandem.config.scheduling import SchedulingConfig
from tandem.config.serving.autoscaling import AutoscalingConfig
from tandem.config.serving.batches import BatchesConfig
from tandem.config.serving.caps import RequestCaps
from tandem.config.serving.files import FilesConfig
from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.config.serving.jobs import JobsConfig
from tandem.config.serving.oidc import OidcConfig
from tandem.config.serving.replica import ReplicaConfig
from tandem.config.serving.stored import StoredConfig
from tandem.config.serving.tls import TlsConfig
from tandem.config.serving.webhooks import WebhookConfig
from tandem.errors import ConfigError
from tandem.settings import LONGEST_DRAIN_S

MAX_TIMEOUT_S = 86_400.0
"""Largest timeout, in seconds, of a request or in the gateway's config."""


GUARDED_FIELDS = (
    *(
        "chat_template",
        "chat_template_kwargs",
        "prompt_embeds",
        "image_embeds",
        "audio_embeds",
        "video_embeds",
        "mm_payload",
    ),
    *("mm_processor_kwargs", "media_io_kwargs"),
)
"""Fields of requests that are refused unless `gateway.allow` has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillConfig:
    """Prefill replicas: they read prompts for the model's other replicas, which only generate."""

    replicas: int = 1
    cpus_per_replica: float | None = None
    """Unset: the model's."""
    gpus_per_replica: float | None = None
    """Unset: the model's."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Override the model's, key by key."""
    min_bytes: int = 0
    """Smaller requests, in bytes, are not split: moving the KV cache would cost more than it saves."""

    def __post_init__(self) -> None:
        check.at_least("models[].prefill.replicas", self.replicas, 1)
        check.at_least("models[].prefill.min_bytes", self.min_bytes, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModelConfig(ReplicaConfig):
    """One base model and the replicas that hold it."""

    model: str
    """A registered model, a folder in Hugging Face's format, its URI in an object store (s3://bucket/name; every node fetches it
    once), or a model of the hub: `org/name`, `org/name@revision`."""
    name: str | None = None
    """Name for clients; unset: the registered name (of the hub's `org/name`), or the folder's."""
    autoscaling: AutoscalingConfig | None = None
    """Set: the number of replicas follows the load, instead of `replicas`."""
    surge_percent: int = 100
    """Replicas, in percent, that a rolling change may start before old ones stop. 0 where the cluster has no free resources: old
    replicas then stop first, and a model with one replica is unavailable while the new one starts."""
    requests_per_replica: int | None = None
    """Sequences in flight at one replica (prompts x n); more wait at the gateways, by priority. Unset: 1.25 times what its engine
    generates at once (vLLM's `max_num_seqs`); the quarter waits inside the engine."""
    max_queued: int = 1000
    """Requests that may wait at all gateways together; others get 429 with Retry-After."""
    hold_s: float = 30.0
    """Seconds that a request waits while no replica is ready, before it gets 503 with Retry-After."""
    prefill: PrefillConfig | None = None
    """Set: prefill replicas read the prompts, and the KV cache moves to the replica that generates."""
    stuck_after_s: float = 60.0
    """Seconds without a completed step after which an engine with work counts as stuck and its replica is replaced; longer than
    its longest step."""

    def __post_init__(self) -> None:
        check.at_least("models[].replicas", self.replicas, 1)
        if self.autoscaling is not None and self.replicas != 1:
            raise ConfigError(
                f"models[].replicas is {self.replicas}, and autoscaling gives {self.autoscaling.min_replicas} to "
                f"{self.autoscaling.max_replicas}. Leave out `replicas`, or set autoscaling.min_replicas and initial_replicas."
            )
        if self.autoscaling is not None and not self.autoscaling.min_replicas and not self.hold_s:
            raise ConfigError(
                "models[].hold_s is 0 and autoscaling.min_replicas too: no request would wait for the replica that it starts. "
                "Give hold_s the time that a replica takes to start."
            )
        check.between("models[].surge_percent", self.surge_percent, 0, 100)
        if self.requests_per_replica is not None:
            check.at_least("models[].requests_per_replica", self.requests_per_replica, 1)
        check.at_least("models[].max_queued", self.max_queued, 0)
        check.at_least("models[].hold_s", self.hold_s, 0.0)
        check.at_least("models[].cpus_per_replica", self.cpus_per_replica, 0.0)
        check.at_least("models[].gpus_per_replica", self.gpus_per_replica, 0.0)
        check.resources("models[].resources_per_replica", self.resources_per_replica)
        check.at_least("models[].max_adapters", self.max_adapters, 0)
        if self.max_cached_adapters is not None and self.max_cached_adapters < self.max_adapters:
            raise ConfigError(
                f"models[].max_cached_adapters is {self.max_cached_adapters} and max_adapters {self.max_adapters}: what is in a "
                "slot is in host memory too. Raise it, or unset it for four times max_adapters."
            )
        check.at_least("models[].stuck_after_s", self.stuck_after_s, 1.0)
        check.between("models[].max_lora_rank", self.max_lora_rank, 1, 512)

    @property
    def cached_adapters(self) -> int:
        """Adapters kept in host memory."""
        return 4 * self.max_adapters if self.max_cached_adapters is None else self.max_cached_adapters


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """The ingress that clients talk to."""

    replicas: int = 1
    connect_timeout_s: float = 5.0
    """Seconds that a connection to an engine may take before another replica is tried."""
    request_timeout_s: float = 600.0
    """Seconds that an engine may be silent on a request without a `timeout` of its own; then the client gets 504."""
    client_stall_s: float = 60.0
    """Seconds that a client may read nothing of its answer, once all buffers on the way are full, before it is disconnected."""
    retry_after_s: int = 5
    """Retry-After of a 503, in seconds, and of a 429 while the queue's throughput is not known."""
    max_body_bytes: int = 2 * 2**20
    """Largest request body, in bytes; a larger one gets 413."""
    max_held_bytes: int = 256 * 2**20
    """Bytes of bodies that one gateway holds: those it reads, those that wait, and those whose engine has not answered yet; with
    more a request gets 503 with Retry-After. At least `max_body_bytes`. One tenant holds half of it at most."""
    upload_timeout_s: float = 60.0
    """Seconds that a client may take to send a request's body; then it gets 408."""
    quarantine_s: float = 300.0
    """Seconds for which a gateway refuses a request (422) with which two replicas were lost; 0: it does not."""
    access_log: bool = True
    """Whether each gateway writes a line of JSON for each request to TANDEM_HOME/logs/access-ID.jsonl, without its content."""
    strict: bool = False
    """Whether a request with an unknown field gets 400; otherwise it is answered with a warning in `x-tandem-warning`."""
    caps: RequestCaps = field(default_factory=RequestCaps)
    files: FilesConfig = field(default_factory=FilesConfig)
    fine_tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    batches: BatchesConfig = field(default_factory=BatchesConfig)
    stored: StoredConfig = field(default_factory=StoredConfig)
    max_job_streams: int = 100
    """Streams of events and logs of jobs that one tenant may have open at one gateway; others get 429 with Retry-After."""
    webhooks: tuple[WebhookConfig, ...] = ()
    """Endpoints that are told when fine-tuning jobs and batches end."""
    allow: tuple[str, ...] = ()
    """Guarded fields that requests may have, although an engine runs their templates or reads their tensors: chat_template,
    chat_template_kwargs, prompt_embeds, image_embeds, audio_embeds, video_embeds, mm_payload, mm_processor_kwargs,
    media_io_kwargs."""
    media_hosts: tuple[str, ...] = ()
    """Hosts, `name` or `name:port`, from which engines may fetch images, audio, video and files of requests; data: URLs are
    always taken."""
    adapter_sources: tuple[str, ...] = ()
    """Folders and URIs, such as s3://bucket/adapters, below which `POST /admin/adapters` takes adapters; it also takes jobs and
    folders below TANDEM_HOME."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as https://chat.example.com, whose web pages browsers let call the app (CORS); a page still needs a key."""
    oidc: OidcConfig | None = None
    """Set: tokens of an OIDC provider are accepted beside API keys, and every request needs one or the other."""

    def __post_init__(self) -> None:
        for origin in self.cors_origins:
            scheme, _, host = origin.partition("://")
            if scheme not in ("http", "https") or not host or "/" in host or "*" in host:
                raise ConfigError(
                    f"gateway.cors_origins has {origin!r}; give a scheme and a host, such as https://chat.example.com. "
                    "All origins at once would let any web page use an app without keys."
                )
        urls = [each.url for each in self.webhooks]
        if len(set(urls)) < len(urls):
            raise ConfigError(
                "gateway.webhooks has the same url twice; give each endpoint one entry, or another path or query."
            )
        check.at_least("gateway.replicas", self.replicas, 1)
        for name in self.allow:
            check.one_of("gateway.allow", name, GUARDED_FIELDS)
        for host in self.media_hosts:
            if "/" in host or host != host.lower():
                raise ConfigError(
                    f"gateway.media_hosts has {host!r}; give a host in lower case, such as images.example.com."
                )
        for key in ("connect_timeout_s", "request_timeout_s", "upload_timeout_s"):
            check.between(f"gateway.{key}", getattr(self, key), 0.1, MAX_TIMEOUT_S)
        check.at_least("gateway.max_body_bytes", self.max_body_bytes, 1024)
        check.at_least("gateway.max_held_bytes", self.max_held_bytes, self.max_body_bytes)
        check.at_least("gateway.max_job_streams", self.max_job_streams, 1)
        check.at_least("gateway.quarantine_s", self.quarantine_s, 0.0)
        check.at_least("gateway.retry_after_s", self.retry_after_s, 1)
        check.at_least("gateway.client_stall_s", self.client_stall_s, 0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenConfig:
    """The public listener, where clients reach the app. Gateways and engines listen on their nodes' addresses."""

    host: str = "127.0.0.1"
    """Address on each node that has the listener; 0.0.0.0: all of the node's."""
    port: int | None = None
    """Unset: TANDEM_PORT, or 8000."""
    nodes: str = "every"
    """`every` node that runs a part of an app, or the `head` alone."""
    tls: TlsConfig | None = None
    """Set: the listener speaks TLS alone. Unset: TANDEM_TLS_CERTIFICATE and TANDEM_TLS_KEY, or no TLS."""

    def __post_init__(self) -> None:
        check.one_of("listen.nodes", self.nodes, ("every", "head"))
        if self.port is not None:
            check.between("listen.port", self.port, 1, 65535)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Choice of a replica. Weights are in requests: a preferred replica may have so many more than others.

    That holds up to 8 requests for each replica on average; above, weights grow in proportion.
    """

    policy: str = "affinity"
    """affinity, least_loaded, two_choices, round_robin, prefix_tree, or another entry of `routing.policies.POLICIES`."""
    adapter_requests: float = 8.0
    """affinity: weight of a replica that holds the adapter."""
    session_requests: float = 8.0
    """affinity: weight of the replica that had the session's last request."""
    home_requests: float = 8.0
    """affinity: weight of the replica that a text, session or adapter hashes to, so that several gateways agree without
    communication. Unused with one gateway."""
    prefix_requests: float = 16.0
    """affinity: largest weight of a replica that has read a prefix of the text."""
    prefix_bytes_per_request: int = 1024
    """affinity: bytes of common prefix that weigh one request."""
    match_rate: float = 0.1
    """prefix_tree: share of a text that a replica must have read to be preferred."""
    imbalance_requests: int = 10
    """prefix_tree: largest difference of loads, in requests, at which prefixes decide."""
    remembered_blocks: int = 200_000
    """Text prefixes that a gateway remembers; the least recently used are dropped first."""
    remembered_sessions: int = 100_000
    """Sessions that a gateway remembers."""

    def __post_init__(self) -> None:
        for key in ("adapter_requests", "session_requests", "home_requests", "prefix_requests", "imbalance_requests"):
            check.at_least(f"router.{key}", getattr(self, key), 0)
        for key in ("prefix_bytes_per_request", "remembered_blocks", "remembered_sessions"):
            check.at_least(f"router.{key}", getattr(self, key), 1)
        check.between("router.match_rate", self.match_rate, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One Serve app."""

    models: tuple[ServedModelConfig, ...] = ()
    """Empty: the newest registered base model."""
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """Of the jobs that clients create. Of several apps on one database, that of the app which dispatches counts."""
    jobs: JobsConfig = field(default_factory=JobsConfig)
    """Likewise."""
    app: str = "tandem"
    """Name of the Serve application."""
    drain_timeout_s: float = 600.0
    """Seconds that streams may continue in a stopping replica or gateway. An idle engine stops at once."""
    internal_tls: bool = True
    """Whether directory, gateways and engines speak TLS with each other, with certificates made for the app, where the nodes do
    not talk over loopback. False where the network encrypts what passes between nodes."""
    version: str = ""
    """Version of what Tandem cannot see, such as other packages: a change replaces all replicas when the app is deployed again.
    Changes of Tandem's own code are detected."""

    def __post_init__(self) -> None:
        check.between("drain_timeout_s", self.drain_timeout_s, 0.0, LONGEST_DRAIN_S)
        fine_tuning = self.gateway.fine_tuning
        if fine_tuning.priority is not None:
            check.one_of("gateway.fine_tuning.priority", fine_tuning.priority, self.scheduling.priority_classes)
        if fine_tuning.time_limit is not None:
            self.scheduling.time_limit_s(fine_tuning.time_limit)
        names = [model.name or model.model for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"models: {name!r} is listed {names.count(name)} times; give each a name of its own.")
