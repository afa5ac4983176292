"""Pod templates of Ray nodes. Pure: the site's config in, plain values of a manifest out.

All containers run as one unprivileged user on a read-only root file system. What they write lies on volumes: TANDEM_HOME on a
shared claim, the rest on the pod's own disk. Kubernetes gives such a disk mode 0777 without the sticky bit, so an init container
makes folders on it that are this user's alone, and only these are mounted (docs/adr/0035-kubernetes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.config.kubernetes import KubernetesSite, PodConfig, PoolConfig, in_gib

Manifest = dict[str, Any]

USER_ID = 10001
"""User and group of the image (deploy/docker/Dockerfile)."""
LABELS = {"app.kubernetes.io/part-of": "tandem", "app.kubernetes.io/managed-by": "tandem"}
POOL_LABEL = "pool"
"""Label of pods and of Ray nodes with the name of their pool, as in cluster.yaml."""
SERVE_PORT = 8000
METRICS_PORT, AGENT_PORT, GCS_PORT, DASHBOARD_PORT, CLIENT_PORT = 8080, 52365, 6379, 8265, 10001
"""Ray's ports that KubeRay sets: metrics and the agent of each node; on the head GCS, dashboard and client server."""
STOP_S = 120
"""Seconds that a pod gets to end its node."""
LEAVE_S = 15
"""Seconds before a serving pod ends its node, in which load balancers learn that it takes no new connections."""
MODEL_SHARE, ADAPTER_SHARE = 0.8, 0.1
"""Shares of a pod's `scratch` for copies of base models and of adapters. A pod that writes more than `scratch` is evicted."""
HOME, RUN, SHARED = "/home/tandem", "/run/tandem", "/shared"
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
CONFIG_FOLDER = "/etc/tandem/job"
HEAD_ACCOUNT, ACCOUNT = "tandem-head", "tandem"
"""Service accounts: the head's may scale the cluster, the other may do nothing."""
SERVE_PRIORITY, TRAIN_PRIORITY = "tandem-serving", "tandem-training"

START = """\
ulimit -n 65536
# This shell is process 1: it takes the signal that ends the pod, and collects orphaned processes.
trap 'tandem node stop' TERM
eval "tandem node start ${KUBERAY_GEN_RAY_START_CMD#ray start}" &
wait $!
"""
"""Starts a Ray node through `tandem node start`, with the options of the `ray start` that KubeRay generates."""
FOLDERS = """\
set -e
umask 077
mkdir -p /scratch/home /scratch/run /claim/tandem
mkdir -p -m 1777 /scratch/tmp
"""
SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    # Large claims are not walked through at each start.
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
OWN_MOUNTS = (
    {"name": "scratch", "mountPath": HOME, "subPath": "home"},
    {"name": "scratch", "mountPath": RUN, "subPath": "run"},
    {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},
)
MOUNTS = (
    *OWN_MOUNTS,
    {"name": "home", "mountPath": f"{SHARED}/tandem", "subPath": "tandem"},
    {"name": "shared-memory", "mountPath": "/dev/shm"},
)


def head_pod(site: KubernetesSite, *, priority: str, account: str = ACCOUNT, config_map: str | None = None) -> Manifest:
    """The template of the head's pod. `config_map`: a ConfigMap with the files of a job, mounted at CONFIG_FOLDER."""
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "client": CLIENT_PORT, "serve": SERVE_PORT}
    container = _container(site, "ray-head", site.head, ports, healthy(AGENT_PORT, "/api/healthz"))
    template = _template(site, site.head, [container], priority)
    spec = template["spec"]
    spec["serviceAccountName"] = account
    database = {
        **_base_container(site, "database"),
        "command": ["tandem", "db", "upgrade"],
        "env": container["env"],
        "envFrom": container["envFrom"],
        "resources": _resources("500m", "1Gi"),
        "volumeMounts": list(MOUNTS),
    }
    spec["initContainers"].append(database)
    if config_map is not None:
        container["volumeMounts"] = [*MOUNTS, {"name": "job", "mountPath": CONFIG_FOLDER, "readOnly": True}]
        spec["volumes"].append({"name": "job", "configMap": {"name": config_map}})
    return template


def worker_pod(site: KubernetesSite, pool: PoolConfig, *, priority: str, serves: bool = False) -> Manifest:
    """The template of a pool's pods. With `serves` a pod is ready when its gateway takes requests."""
    ready = healthy(SERVE_PORT, "/health/ready") if serves else healthy(AGENT_PORT, "/api/healthz")
    ports = {"serve": SERVE_PORT} if serves else {}
    container = _container(site, "ray-worker", pool, ports, ready)
    template = _template(site, pool, [container], priority)
    spec = template["spec"]
    if serves:
        container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(LEAVE_S)]}}}
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {**LABELS, POOL_LABEL: "serve"}},
            }
        ]
    else:
        # A node that the cluster's own autoscaler takes away would end the run.
        template["metadata"]["annotations"] = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    if pool.gpus:
        container["resources"]["limits"][site.gpu_resource] = str(pool.gpus)
        if site.runtime_class is not None:
            spec["runtimeClassName"] = site.runtime_class
    return template


def submitter_pod(site: KubernetesSite) -> Manifest:
    """The template of the pod in which KubeRay runs `ray job submit`; it sets the command."""
    container = {
        **_base_container(site, "ray-job-submitter"),
        "env": _variables({"HOME": HOME}),
        "volumeMounts": list(OWN_MOUNTS),
        "resources": _resources("500m", "1Gi"),
    }
    template = _template(site, PodConfig(scratch="1Gi"), [container], TRAIN_PRIORITY)
    spec = template["spec"]
    spec["restartPolicy"] = "Never"
    # It needs no home, no secrets, and little memory.
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] == "scratch"]
    spec["initContainers"][0]["volumeMounts"] = [{"name": "scratch", "mountPath": "/scratch"}]
    spec["initContainers"][0]["args"] = [FOLDERS.replace(" /claim/tandem", "")]
    return template


def autoscaler(site: KubernetesSite) -> Manifest:
    """Options of the autoscaler, a container of the head's pod. It alone has a token for Kubernetes' API."""
    token = {"name": "api-token", "mountPath": TOKEN_FOLDER, "readOnly": True}
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": site.idle_timeout_s,
        "imagePullPolicy": site.pull_policy,
        "securityContext": SECURITY,
        "env": _variables({"HOME": HOME}),
        "volumeMounts": [*OWN_MOUNTS, token],
        "resources": _resources("500m", "1Gi"),
    }


def token_volume() -> Manifest:
    """What a pod's API token consists of, as a volume for one container instead of all."""
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
    ]
    return {"name": "api-token", "projected": {"defaultMode": 0o440, "sources": sources}}


def healthy(port: int, path: str) -> Manifest:
    """A probe by HTTP."""
    return {"httpGet": {"path": path, "port": port}, "periodSeconds": 5, "timeoutSeconds": 5}


def _container(site: KubernetesSite, name: str, pod: PodConfig, ports: Mapping[str, int], ready: Manifest) -> Manifest:
    variables = {
        "HOME": HOME,
        "TANDEM_HOME": f"{SHARED}/tandem",
        "TANDEM_RUNTIME_DIR": RUN,
        # The default is the number of the machine's cores, which other pods use too.
        "OMP_NUM_THREADS": "1",
        "TANDEM_MODEL_CACHE_GIB": f"{MODEL_SHARE * in_gib(pod.scratch):g}",
        "TANDEM_ADAPTER_CACHE_GIB": f"{ADAPTER_SHARE * in_gib(pod.scratch):g}",
        **site.environment,
    }
    named = {**ports, "metrics": METRICS_PORT}
    return {
        **_base_container(site, name),
        "command": ["/bin/bash", "-c"],
        "args": [START],
        "env": _variables(variables),
        "envFrom": [{"secretRef": {"name": secret}} for secret in site.secrets],
        "ports": [{"name": port_name, "containerPort": port} for port_name, port in named.items()],
        "resources": _resources(str(pod.cpus), pod.memory),
        "volumeMounts": list(MOUNTS),
        # Ray's own check of a node; two minutes without an answer.
        "livenessProbe": {**healthy(AGENT_PORT, "/api/healthz"), "initialDelaySeconds": 60, "failureThreshold": 24},
        "readinessProbe": {**ready, "initialDelaySeconds": 10, "failureThreshold": 2},
    }


def _base_container(site: KubernetesSite, name: str) -> Manifest:
    return {"name": name, "image": site.image, "imagePullPolicy": site.pull_policy, "securityContext": SECURITY}


def _template(site: KubernetesSite, pod: PodConfig, containers: list[Manifest], priority: str) -> Manifest:
    folders = {
        **_base_container(site, "folders"),
        "command": ["/bin/bash", "-c"],
        "args": [FOLDERS],
        "resources": _resources("100m", "64Mi"),
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}, {"name": "home", "mountPath": "/claim"}],
    }
    spec: Manifest = {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "priorityClassName": priority,
        "terminationGracePeriodSeconds": STOP_S,
        "securityContext": POD_SECURITY,
        "initContainers": [folders],
        "containers": containers,
        "volumes": [
            {"name": "home", "persistentVolumeClaim": {"claimName": site.home_claim}},
            {"name": "scratch", "emptyDir": {"sizeLimit": pod.scratch}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shared_memory}},
        ],
    }
    if site.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in site.pull_secrets]
    if pod.node_selector:
        spec["nodeSelector"] = dict(pod.node_selector)
    if pod.tolerations:
        spec["tolerations"] = [
            {
                "key": each.key,
                "operator": "Exists" if each.value is None else "Equal",
                **({} if each.value is None else {"value": each.value}),
                **({} if each.effect is None else {"effect": each.effect}),
            }
            for each in pod.tolerations
        ]
    return {"metadata": {"labels": dict(LABELS)}, "spec": spec}


def _variables(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _resources(cpus: str, memory: str) -> Manifest:
    # Memory cannot be taken back, so no more than what is requested; CPUs are shared.
    return {"requests": {"cpu": cpus, "memory": memory}, "limits": {"memory": memory}}
