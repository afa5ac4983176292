"""Manifests of RayCluster, RayService and RayJob, and their disruption budgets. Pure: config in, plain values out."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tandem.cluster.kubernetes.pods import (
    CONFIG_FOLDER,
    HEAD_ACCOUNT,
    LABELS,
    POOL_LABEL,
    SERVE_PORT,
    SERVE_PRIORITY,
    TRAIN_PRIORITY,
    Manifest,
    autoscaler,
    head_pod,
    submitter_pod,
    token_volume,
    worker_pod,
)
from tandem.config.kubernetes import KubernetesSite, PoolConfig
from tandem.errors import ConfigError
from tandem.settings import LONGEST_DRAIN_S

API_VERSION = "ray.io/v1"
KINDS = {"cluster": "RayCluster", "serve": "RayService", "train": "RayJob"}
"""What a user submits, and the kind of KubeRay's resource for it."""
ANNOTATIONS = {"ray.io/overwrite-container-cmd": "true"}
"""KubeRay leaves the containers' command as it is, and tells it of its own by a variable."""
BUDGET_API_VERSION, BUDGET_KIND = "policy/v1", "PodDisruptionBudget"
INSTANCE_LABEL = "app.kubernetes.io/instance"
"""Label of pods with the resource that they belong to. KubeRay's own label names a cluster, of which a RayService has several."""
JOB_FILE = "job.yaml"
HEAD_CPUS = 2
"""Logical CPUs of a head, as in cluster.yaml. One of an app has none: were all replicas there, no worker would take requests."""
SPARE_CPUS = 6
"""CPUs beside those of a job's workers, for its driver and the tasks that read its data (as `sdk.training.logical_cpus`)."""
KEEP_FINISHED_S = 600
"""Seconds for which the cluster of a training job stays after its end, with its logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSubmission:
    """An app to serve."""

    name: str
    app: str = "tandem"
    """Serve's name of the application."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ServeConfig."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSubmission:
    """A training job."""

    name: str
    values: Mapping[str, Any]
    """Keys of TrainConfig."""
    workers: int
    """Ranks; as many as the job starts with."""
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0


def cluster_manifests(site: KubernetesSite, name: str) -> list[Manifest]:
    """A RayCluster with the pools of cluster.yaml, for training and serving on one cluster."""
    pools = {"data": site.data, "serve": site.serve, "train": site.train}
    priorities = {"data": TRAIN_PRIORITY, "serve": SERVE_PRIORITY, "train": TRAIN_PRIORITY}
    groups = [
        _group(key, pool, worker_pod(site, pool, priority=priorities[key]), pool.min_replicas, pool.max_replicas)
        for key, pool in pools.items()
    ]
    spec = _scaled(site, instance_of("cluster", name), groups, head_cpus=HEAD_CPUS)
    return [_resource(site, "cluster", name, spec), *_budgets(site, "cluster", name)]


def serve_manifests(site: KubernetesSite, submission: ServeSubmission) -> list[Manifest]:
    """A RayService: the operator keeps the app up, and replaces its cluster without a failed request."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},  # noqa: S104 - network policies say who reaches it
        "applications": [
            {
                "name": submission.app,
                "route_prefix": "/",
                "import_path": "serve_apps.openai:app",
                "args": dict(submission.values),
            }
        ],
    }
    pool = site.serve
    worker = worker_pod(site, pool, priority=SERVE_PRIORITY, serves=True)
    groups = [_group("serve", pool, worker, pool.min_replicas, pool.max_replicas)]
    spec = {
        "serveConfigV2": yaml.safe_dump(config, sort_keys=False),
        # Requests reach gateways beside the engines; the head is for control.
        "excludeHeadPodFromServeSvc": True,
        "upgradeStrategy": {"type": "NewCluster"},
        # The longest that a stream may go on in a cluster that has been replaced.
        "rayClusterDeletionDelaySeconds": LONGEST_DRAIN_S,
        "rayClusterConfig": _scaled(site, instance_of("serve", submission.name), groups, head_cpus=0),
    }
    return [_resource(site, "serve", submission.name, spec), *_budgets(site, "serve", submission.name)]


def train_manifests(site: KubernetesSite, submission: TrainSubmission) -> list[Manifest]:
    """A RayJob with a cluster of its own, and the ConfigMap with its config.

    ConfigError if a pod of the pool has fewer GPUs or CPUs than one rank needs.
    """
    count = pods_needed(site.train, submission)
    config_map = config_map_of(submission.name)
    command = ["tandem", "train", "submit", "--raw", "--config", f"{CONFIG_FOLDER}/{JOB_FILE}"]
    group = _group("train", site.train, worker_pod(site, site.train, priority=TRAIN_PRIORITY), count, count)
    head = head_pod(site, priority=TRAIN_PRIORITY, config_map=config_map)
    cluster = _cluster(site, instance_of("train", submission.name), head, [group], head_cpus=HEAD_CPUS)
    spec: Manifest = {
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_pod(site),
        # Each retry has a new cluster; the job goes on from its newest checkpoint.
        "backoffLimit": site.train_retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_FINISHED_S,
        "rayClusterSpec": cluster,
    }
    if site.train_time_limit_s is not None:
        spec["activeDeadlineSeconds"] = site.train_time_limit_s
    files = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(site, config_map),
        "data": {JOB_FILE: yaml.safe_dump(dict(submission.values), sort_keys=False)},
    }
    return [files, _resource(site, "train", submission.name, spec), *_budgets(site, "train", submission.name)]


def config_map_of(name: str) -> str:
    """The name of the ConfigMap with a training job's config."""
    return f"{name}-job"


def instance_of(what: str, name: str) -> str:
    """The value of INSTANCE_LABEL. `what`: a key of KINDS, because resources of two kinds may have one name."""
    return f"{what}-{name}"


def budget_names(what: str, name: str) -> list[str]:
    """Names of the disruption budgets of a cluster, an app or a job."""
    parts = ("head",) if what == "train" else ("head", "serve")
    return [f"{instance_of(what, name)}-{part}" for part in parts]


def _budgets(site: KubernetesSite, what: str, name: str) -> list[Manifest]:
    """Budgets for `kubectl drain` and the like, which keep one pod each of this resource's own.

    They count pods (minAvailable): KubeRay's resources have no scale subresource, of which a share could be taken. With Redis a
    head is replaced within a minute or two, and requests are answered meanwhile; training ends and is tried again. So a head is
    not moved while it works. To empty its node, delete the pod.
    """
    selectors = ({"ray.io/node-type": "head"}, {POOL_LABEL: "serve"})
    return [
        {
            "apiVersion": BUDGET_API_VERSION,
            "kind": BUDGET_KIND,
            "metadata": _metadata(site, budget),
            "spec": {
                "minAvailable": 1,
                "selector": {"matchLabels": {INSTANCE_LABEL: instance_of(what, name), **selector}},
            },
        }
        for budget, selector in zip(budget_names(what, name), selectors, strict=False)
    ]


def pods_needed(pool: PoolConfig, submission: TrainSubmission) -> int:
    """Pods of `pool` that hold a job's ranks, its driver and its data's tasks; ConfigError if none holds a rank."""
    needed = {"gpus": submission.gpus_per_worker, "cpus": submission.cpus_per_worker}
    has = {"gpus": pool.gpus, "cpus": pool.cpus}
    ranks = [math.floor(has[key] / needed[key]) for key in needed if needed[key] > 0]
    if 0 in ranks:
        key = next(key for key in needed if needed[key] > has[key])
        raise ConfigError(
            f"Each worker of the job needs {needed[key]:g} {key}, and a pod of the site's train pool has {has[key]}. Raise "
            f"train.{key} of the site's config (--site-set train.{key}={math.ceil(needed[key])})."
        )
    cpus = submission.workers * submission.cpus_per_worker + SPARE_CPUS - HEAD_CPUS
    return max(math.ceil(submission.workers / min(ranks, default=submission.workers)), math.ceil(cpus / pool.cpus))


def _scaled(site: KubernetesSite, instance: str, groups: list[Manifest], *, head_cpus: int) -> Manifest:
    """A cluster that the autoscaler grows and shrinks, and whose control state outlives the head."""
    head = head_pod(site, priority=SERVE_PRIORITY, account=HEAD_ACCOUNT)
    head["spec"]["volumes"].append(token_volume())
    spec = _cluster(site, instance, head, groups, head_cpus=head_cpus)
    spec |= {"enableInTreeAutoscaling": True, "autoscalerOptions": autoscaler(site)}
    if site.redis_address is not None:
        secret = {"name": site.redis_secret, "key": "password"}
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": site.redis_address,
            "redisPassword": {"valueFrom": {"secretKeyRef": secret}},
        }
    return spec


def _cluster(
    site: KubernetesSite, instance: str, head: Manifest, groups: list[Manifest], *, head_cpus: int
) -> Manifest:
    for template in (head, *(group["template"] for group in groups)):
        template["metadata"]["labels"][INSTANCE_LABEL] = instance
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token", "secretName": site.token_secret},
        "headGroupSpec": {"rayStartParams": {"num-cpus": str(head_cpus)}, "template": head},
        "workerGroupSpecs": groups,
    }


def _group(name: str, pool: PoolConfig, template: Manifest, replicas: int, most: int) -> Manifest:
    return {
        "groupName": name,
        "replicas": replicas,
        "minReplicas": replicas,
        "maxReplicas": most,
        "labels": {POOL_LABEL: name},
        "rayStartParams": {"num-cpus": str(pool.cpus)},
        "template": template,
    }


def _resource(site: KubernetesSite, what: str, name: str, spec: Manifest) -> Manifest:
    metadata = {**_metadata(site, name), "annotations": dict(ANNOTATIONS)}
    return {"apiVersion": API_VERSION, "kind": KINDS[what], "metadata": metadata, "spec": spec}


def _metadata(site: KubernetesSite, name: str) -> Manifest:
    return {"name": name, "namespace": site.namespace, "labels": dict(LABELS)}


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: text of several lines as a block, and values that occur twice written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(manifests: list[Manifest]) -> str:
    """The manifests as a YAML file."""
    # Through JSON: what is no plain value fails here, not in the cluster.
    plain = json.loads(json.dumps(manifests))
    text: str = yaml.dump_all(plain, Dumper=_Dumper, sort_keys=False, width=120)
    return text
