"""Apply, list and delete through Kubernetes' official client, over HTTP, on a server that checks as an API server does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubernetes_api import KubernetesApi

from tandem.cluster.kubernetes.client import Kubernetes, RunSummary, summary
from tandem.cluster.kubernetes.manifests import (
    ServeSubmission,
    TrainSubmission,
    cluster_manifests,
    serve_manifests,
    train_manifests,
)
from tandem.config.kubernetes import KubernetesSite
from tandem.errors import ClusterError, EnvironmentProblem

SITE = KubernetesSite()
JOB = TrainSubmission(name="sft", values={"name": "sft"}, workers=1)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def test_a_training_job_and_its_config_are_applied_as_they_were_rendered(api: KubernetesApi) -> None:
    manifests = train_manifests(SITE, JOB)
    Kubernetes(SITE).apply(manifests)
    budget = api.objects["policy/v1", "poddisruptionbudgets", "train-sft-head"]
    assert [api.objects["v1", "configmaps", "sft-job"], api.objects["ray.io/v1", "rayjobs", "sft"], budget] == manifests
    for query in api.applied:
        assert query == {"fieldManager": ["tandem"], "fieldValidation": ["Strict"], "force": ["false"]}
    # Once more: the same object.
    Kubernetes(SITE).apply(manifests)
    assert len(api.objects) == 3


def test_a_check_leaves_nothing(api: KubernetesApi) -> None:
    Kubernetes(SITE).apply(serve_manifests(SITE, ServeSubmission(name="tandem")), dry_run=True)
    assert api.applied[0]["dryRun"] == ["All"] and not api.objects


def test_a_field_that_the_api_does_not_know_is_an_error(api: KubernetesApi) -> None:
    service, *_ = serve_manifests(SITE, ServeSubmission(name="tandem"))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(ClusterError, match=r"RayService tandem: Kubernetes refused it: .*rayStartParam"):
        Kubernetes(SITE).apply([service])
    assert not api.objects


def test_fields_of_others_are_taken_over_only_if_told_so(api: KubernetesApi) -> None:
    manifests = cluster_manifests(SITE, "tandem")
    key = ("ray.io/v1", "rayclusters", "tandem")
    api.objects[key], api.managers[key] = manifests[0], "kubectl"
    with pytest.raises(ClusterError, match=r"somebody else manages fields of it: .*kubectl.*--force"):
        Kubernetes(SITE).apply(manifests)
    Kubernetes(SITE).apply(manifests, force=True)
    assert api.managers[key] == "tandem"


def test_what_was_submitted_is_listed_and_deleted(api: KubernetesApi) -> None:
    kubernetes = Kubernetes(SITE)
    assert kubernetes.runs() == []
    kubernetes.apply(
        [
            *train_manifests(SITE, JOB),
            *serve_manifests(SITE, ServeSubmission(name="llm")),
            *cluster_manifests(SITE, "tandem"),
        ]
    )
    # The cluster of an app has its labels, and is not listed.
    owned = cluster_manifests(SITE, "llm-abcde")[0]
    owned["metadata"]["ownerReferences"] = [{"kind": "RayService", "name": "llm"}]
    api.objects["ray.io/v1", "rayclusters", "llm-abcde"] = owned
    # What others have made is not ours.
    foreign = serve_manifests(SITE, ServeSubmission(name="other"))[0]
    foreign["metadata"]["labels"] = {}
    api.objects["ray.io/v1", "rayservices", "other"] = foreign
    assert [(run.what, run.name, run.state) for run in kubernetes.runs()] == [
        ("cluster", "tandem", "starting"),
        ("serve", "llm", "starting"),
        ("train", "sft", "new"),
    ]
    kubernetes.delete("train", "sft")
    assert not [key for key in api.objects if "sft" in key[2]]
    kubernetes.delete("serve", "llm")
    assert not [key for key in api.objects if key[1] == "poddisruptionbudgets" and "llm" in key[2]]
    # A job whose config somebody has deleted goes too.
    kubernetes.apply(train_manifests(SITE, JOB))
    del api.objects["v1", "configmaps", "sft-job"]
    kubernetes.delete("train", "sft")
    with pytest.raises(ClusterError, match=r"RayJob sft is not in the namespace tandem: .*tandem kubernetes status"):
        kubernetes.delete("train", "sft")


def test_a_cluster_without_the_operator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KubernetesApi(resources={"v1": {"configmaps": "ConfigMap"}}) as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        with pytest.raises(ClusterError, match="KubeRay operator is not installed"):
            Kubernetes(SITE).apply(cluster_manifests(SITE, "tandem"))


def test_a_namespace_that_is_not_there_is_named_with_the_command_that_makes_it(api: KubernetesApi) -> None:
    site = replace(SITE, namespace="elsewhere")
    with pytest.raises(
        ClusterError, match=r'namespaces "elsewhere" not found.*kubectl apply -k deploy/kubernetes/base'
    ):
        Kubernetes(site).apply(cluster_manifests(site, "tandem"))


def test_wrong_credentials_a_wrong_context_and_no_cluster_are_told(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="does not know who asks"):
        Kubernetes(replace(SITE, context="stranger"))
    with pytest.raises(ClusterError, match="kubectl config get-contexts"):
        Kubernetes(replace(SITE, context="nobody"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    with pytest.raises(ClusterError, match="Set KUBECONFIG"):
        Kubernetes(SITE)
    with KubernetesApi() as gone:
        monkeypatch.setenv("KUBECONFIG", str(gone.kubeconfig(tmp_path / "gone")))
    with pytest.raises(ClusterError, match="does not answer"):
        Kubernetes(SITE)


def test_the_clients_cache_is_not_left_where_others_can_write(api: KubernetesApi) -> None:
    import tempfile

    before = set(Path(tempfile.gettempdir()).glob("osrcp-*"))
    Kubernetes(SITE).apply(cluster_manifests(SITE, "tandem"))
    assert set(Path(tempfile.gettempdir()).glob("osrcp-*")) == before


def test_without_the_package_the_way_around_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'tandem\[kubernetes\]'.*tandem kubernetes render"):
        Kubernetes(SITE)


@pytest.mark.parametrize(
    ("what", "status", "state", "message"),
    [
        ("train", {}, "new", ""),
        ("train", {"jobDeploymentStatus": "Initializing"}, "initializing", ""),
        ("train", {"jobStatus": "FAILED", "message": "out of memory"}, "failed", "out of memory"),
        ("cluster", {"state": "ready"}, "ready", ""),
        ("serve", {"conditions": [{"type": "Ready", "status": "True"}]}, "ready", ""),
        (
            "serve",
            {
                "conditions": [{"type": "Ready", "status": "False", "message": "no endpoints"}],
                "pendingServiceStatus": {
                    "applicationStatuses": {"tandem": {"status": "DEPLOY_FAILED", "message": "no such model"}}
                },
            },
            "starting",
            "tandem: no such model",
        ),
        (
            "serve",
            {"conditions": [{"type": "Ready", "status": "False", "message": "no endpoints"}]},
            "starting",
            "no endpoints",
        ),
    ],
)
def test_a_runs_state_is_what_the_operator_says(what: str, status: dict[str, Any], state: str, message: str) -> None:
    found = summary(what, {"metadata": {"name": "a"}, "status": status})
    assert found == RunSummary(what=what, name="a", state=state, message=message)
