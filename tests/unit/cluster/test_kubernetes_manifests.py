"""Manifests made from a site's config and a submission; bash itself runs the script that starts a pod's node."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_api import documents, problems

from tandem.cluster.kubernetes import pods
from tandem.cluster.kubernetes.manifests import (
    SPARE_CPUS,
    ServeSubmission,
    TrainSubmission,
    cluster_manifests,
    pods_needed,
    serve_manifests,
    to_yaml,
    train_manifests,
)
from tandem.cluster.launcher import ClusterFile
from tandem.cluster.slurm.script import REQUEUE_STATUS
from tandem.config import TrainConfig
from tandem.config.kubernetes import KubernetesSite, PodConfig, PoolConfig, TolerationConfig, check_name, in_gib
from tandem.config.load import from_dict
from tandem.errors import ConfigError
from tandem.private import check_private_folder
from tandem.sdk.training import logical_cpus
from tandem.settings import LONGEST_DRAIN_S, Settings

REPOSITORY = Path(__file__).resolve().parents[3]
GPUS = KubernetesSite(
    image="registry.example.org/tandem:2", pull_secrets=("registry",), runtime_class="nvidia", redis_address=None,
    environment={"HF_HUB_OFFLINE": "1"}, train_time_limit_s=3600,
    train=PoolConfig(
        cpus=32, memory="256Gi", gpus=8, node_selector={"gpu": "h200"},
        tolerations=(TolerationConfig(key="nvidia.com/gpu"), TolerationConfig(key="team", value="lab", effect="NoSchedule")),
    ),
)  # fmt: skip


def train(workers: int = 16, gpus: float = 1, cpus: float = 2) -> TrainSubmission:
    return TrainSubmission(
        name="sft", values={"name": "sft", "steps": 10}, workers=workers, gpus_per_worker=gpus, cpus_per_worker=cpus
    )


def test_manifests_of_any_site_are_valid() -> None:
    for site in (KubernetesSite(), GPUS):
        serve = ServeSubmission(name="tandem", values={"models": [{"model": "a", "engine_args": {"max_model_len": 8}}]})
        for manifest in [
            *serve_manifests(site, serve),
            *train_manifests(site, train(gpus=site.train.gpus)),
            *cluster_manifests(site, "tandem"),
        ]:
            assert problems(manifest) == []


def test_a_training_job_gets_the_pods_that_hold_its_workers() -> None:
    files, job, _ = train_manifests(GPUS, train())
    assert yaml.safe_load(files["data"]["job.yaml"]) == {"name": "sft", "steps": 10}
    spec = job["spec"]
    assert spec["entrypoint"] == f"tandem train submit --raw --config {pods.CONFIG_FOLDER}/job.yaml"
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["shutdownAfterJobFinishes"]) == (3, 3600, True)
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    # Nothing scales it, so nothing in it asks Kubernetes; a new cluster is what outlives a lost head.
    assert "enableInTreeAutoscaling" not in cluster and "gcsFaultToleranceOptions" not in cluster
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert {"name": "job", "configMap": {"name": files["metadata"]["name"]}} in head["volumes"]
    pod = group["template"]["spec"]
    assert pod["runtimeClassName"] == "nvidia" and pod["nodeSelector"] == {"gpu": "h200"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"key": "team", "operator": "Equal", "value": "lab", "effect": "NoSchedule"},
    ]
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": "8"}
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in pod["containers"][0]["env"]


@pytest.mark.parametrize(
    ("pool", "submission", "count"),
    [
        (PoolConfig(cpus=12), train(4, 0, 2), 1),
        # Four of the job's other CPUs are in a pod, two in the head.
        (PoolConfig(cpus=8), train(4, 0, 2), 2),
        (PoolConfig(cpus=8), train(5, 0, 2), 2),
        (PoolConfig(cpus=64, gpus=4), train(6, 1, 1), 2),
        (PoolConfig(cpus=5, gpus=4), train(6, 1, 1), 2),
        (PoolConfig(cpus=8, gpus=1), train(2, 0.5, 0), 1),
        (PoolConfig(cpus=8), train(3, 0, 0), 1),
    ],
)
def test_the_number_of_pods_follows_from_gpus_and_cpus(
    pool: PoolConfig, submission: TrainSubmission, count: int
) -> None:
    assert pods_needed(pool, submission) == count


def test_the_spare_cpus_are_those_of_a_local_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    config = from_dict(TrainConfig, yaml.safe_load((REPOSITORY / "train_apps/recipes/quickstart_sft.yaml").read_text()))
    assert logical_cpus(config) == config.parallel.workers * config.parallel.cpus_per_worker + SPARE_CPUS


def test_a_worker_that_no_pod_could_hold_is_refused_with_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"needs 2 gpus.*--site-set train\.gpus=2"):
        pods_needed(PoolConfig(gpus=1), train(2, gpus=2))


def test_an_app_is_served_by_serves_own_config_on_the_service_port() -> None:
    values = {"models": [{"model": "a"}], "gateway": {"replicas": 2}}
    service, *_ = serve_manifests(KubernetesSite(), ServeSubmission(name="llm", app="chat", values=values))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": pods.SERVE_PORT}
    (app,) = config["applications"]
    assert (app["name"], app["import_path"], app["args"]) == ("chat", "serve_apps.openai:app", values)
    from ray.serve.schema import ServeDeploySchema

    assert ServeDeploySchema.model_validate(config).applications[0].name == "chat"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] == LONGEST_DRAIN_S
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "tandem-ray-token"}
    password = cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert password == {"name": "tandem-redis", "key": "password"}
    # Only workers take requests, so all of an app runs on them.
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    ready = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    assert ready == {"path": "/health/ready", "port": pods.SERVE_PORT}


def test_a_cluster_has_the_pools_of_cluster_yaml() -> None:
    cluster, *_ = cluster_manifests(KubernetesSite(), "tandem")
    pools = {group["groupName"]: group["labels"] for group in cluster["spec"]["workerGroupSpecs"]}
    types = ClusterFile.read(REPOSITORY / "cluster.yaml").values["available_node_types"]
    assert pools == {name: kind["labels"] for name, kind in types.items() if name != "head"}


def pod_labels(resource: dict[str, Any]) -> list[dict[str, str]]:
    """Labels of the head's and the serving pods, as KubeRay gives them."""
    spec = resource["spec"]
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    head = cluster["headGroupSpec"]["template"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
    groups = [
        group["template"]["metadata"]["labels"] | group["labels"] | {"ray.io/node-type": "worker"}
        for group in cluster["workerGroupSpecs"]
    ]
    return [head, *(labels for labels in groups if labels["pool"] == "serve")]


def test_each_resource_has_budgets_of_its_own_pods_only() -> None:
    site = KubernetesSite()
    submitted = [
        serve_manifests(site, ServeSubmission(name="tandem")),
        serve_manifests(site, ServeSubmission(name="llm")),
        cluster_manifests(site, "tandem"),
        train_manifests(site, train(2, 0)),
    ]
    resources = [next(each for each in manifests if each["kind"].startswith("Ray")) for manifests in submitted]
    budgets = [each for manifests in submitted for each in manifests if each["kind"] == "PodDisruptionBudget"]
    assert len({budget["metadata"]["name"] for budget in budgets}) == len(budgets) == 7
    assert all(problems(budget) == [] for budget in budgets)
    # Each budget chooses one kind of pods of one resource.
    chosen = [
        (number, place)
        for budget in budgets
        for number, resource in enumerate(resources)
        for place, labels in enumerate(pod_labels(resource))
        if budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ]
    assert chosen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize(
    ("quantity", "gib"),
    [
        ("20Gi", 20),
        ("512Mi", 0.5),
        ("1Ti", 1024),
        ("2147483648", 2),
        ("1.5Gi", 1.5),
        ("2147483648000m", 2),
        ("1G", 0.931),
    ],
)
def test_an_amount_of_kubernetes_is_read_in_gib(quantity: str, gib: float) -> None:
    assert in_gib(quantity) == pytest.approx(gib, rel=1e-3)


def test_the_copies_of_models_and_adapters_fit_the_pods_disk() -> None:
    site = KubernetesSite(serve=PoolConfig(scratch="200Gi"))
    template = pods.worker_pod(site, site.serve, priority="p")
    variables = {each["name"]: each["value"] for each in template["spec"]["containers"][0]["env"]}
    limits = Settings(
        model_cache_gib=float(variables["TANDEM_MODEL_CACHE_GIB"]),
        adapter_cache_gib=float(variables["TANDEM_ADAPTER_CACHE_GIB"]),
    )
    assert (limits.model_cache_gib, limits.adapter_cache_gib) == (160, 20)
    own = replace(site, environment={"TANDEM_MODEL_CACHE_GIB": "7"})
    variables = {
        each["name"]: each["value"]
        for each in pods.worker_pod(own, own.serve, priority="p")["spec"]["containers"][0]["env"]
    }
    assert variables["TANDEM_MODEL_CACHE_GIB"] == "7"


def test_yaml_repeats_what_occurs_twice_and_is_read_back() -> None:
    manifests = train_manifests(KubernetesSite(), train(2, 0))
    text = to_yaml(manifests)
    assert "&id" not in text and "job.yaml: |" in text
    assert documents(text) == [yaml.safe_load(yaml.safe_dump(each)) for each in manifests]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"namespcae": "a"}, "Did you mean 'namespace'"),
        ({"namespace": "My Space"}, "small letters"),
        ({"image": ""}, "image"),
        ({"pull_policy": "Sometimes"}, "Always, IfNotPresent, Never"),
        ({"serve": {"memory": "16 GB"}}, "such as 16Gi"),
        ({"serve": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas is 2; it must be at least 3"),
        ({"train": {"tolerations": [{"key": "a", "effect": "Never"}]}}, "NoSchedule"),
        ({"redis_address": "redis"}, "HOST:PORT"),
        ({"environment": {"A B": "c"}}, "name of a variable"),
        ({"head": {"cpus": 0}}, "at least 1"),
    ],
)
def test_a_site_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(KubernetesSite, values)


@pytest.mark.parametrize("name", ["", "A", "1a", "a_b", "a-", "a" * 48])
def test_a_name_that_kubernetes_refuses_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="at most 47"):
        check_name(name)
    assert check_name("a" * 47)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with a `tandem` that writes down its arguments, and as `node start` runs until `node stop`."""
    folder = tmp_path / "tools"
    folder.mkdir()
    tandem = folder / "tandem"
    tandem.write_text(
        f"""#!/bin/bash
printf '%s\\n' "$@" > {folder}/arguments.$2.new; mv {folder}/arguments.$2.new {folder}/arguments.$2
[ "$2" = stop ] && touch {folder}/stopped
[ "$2" = start ] && until [ -e {folder}/stopped ]; do sleep 0.05; done
exit {REQUEUE_STATUS}
"""
    )
    tandem.chmod(0o755)
    return folder


def start(tools: Path, generated: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "KUBERAY_GEN_RAY_START_CMD": generated,
        "REDIS_PASSWORD": "secret",
    }
    return subprocess.Popen(["/bin/bash", "-c", pods.START], env=environment)


def arguments(tools: Path, command: str) -> list[str]:
    file = tools / f"arguments.{command}"
    while not file.exists():
        time.sleep(0.02)
    return file.read_text().splitlines()


def test_a_pod_starts_its_node_with_the_options_that_kuberay_generates(tools: Path) -> None:
    process = start(
        tools,
        "ray start --head  --block  --dashboard-host=0.0.0.0  --redis-password=$REDIS_PASSWORD "
        """ --resources='{"a b":1}' """,
    )
    assert arguments(tools, "start") == [
        "node", "start", "--head", "--block", "--dashboard-host=0.0.0.0", "--redis-password=secret", '--resources={"a b":1}',
    ]  # fmt: skip
    (tools / "stopped").touch()
    # The container's status is that of the node.
    assert process.wait(20) == REQUEUE_STATUS


def test_the_signal_that_ends_a_pod_ends_its_node(tools: Path) -> None:
    process = start(tools, "ray start --address=head:6379 --block")
    assert arguments(tools, "start")[2:] == ["--address=head:6379", "--block"]
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    assert arguments(tools, "stop") == ["node", "stop"]


def test_folders_on_a_disk_of_kubernetes_are_private(tmp_path: Path) -> None:
    scratch, claim = tmp_path / "scratch", tmp_path / "claim"
    for folder in (scratch, claim):
        folder.mkdir()
        # An emptyDir's mode, and often that of a claim.
        folder.chmod(0o777)
    script = pods.FOLDERS.replace("/scratch", str(scratch)).replace("/claim", str(claim))
    for _ in range(2):
        subprocess.run(["/bin/bash", "-c", script], check=True)
    modes = {
        path: stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("scratch/run", "scratch/home", "claim/tandem")
    }
    assert set(modes.values()) == {0o700}
    assert stat.S_IMODE((scratch / "tmp").stat().st_mode) == 0o1777
    # As where it is mounted in the container, below a folder of root's.
    scratch.chmod(0o755)
    check_private_folder(scratch / "run")
    names = {mount["subPath"] for mount in pods.MOUNTS if "subPath" in mount}
    assert names == {"run", "home", "tmp", "tandem"}


def test_the_disk_and_the_shared_memory_have_the_size_of_the_site() -> None:
    template = pods.head_pod(KubernetesSite(head=PodConfig(scratch="7Gi", shared_memory="3Gi")), priority="p")
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert volumes["scratch"]["emptyDir"] == {"sizeLimit": "7Gi"}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}
