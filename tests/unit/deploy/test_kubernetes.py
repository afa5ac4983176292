"""deploy/kubernetes: rendered by the real kustomize, checked against the schemas of Kubernetes and of the custom resources."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_api import CRDS, REPOSITORY, documents, problems

from tandem.cluster.kubernetes import pods
from tandem.cluster.node import GATEWAY_PORTS, HAPROXY_PORTS
from tandem.config.kubernetes import KubernetesSite
from tandem.settings import Settings

DEPLOY = REPOSITORY / "deploy" / "kubernetes"
RENDER = runpy.run_path(str(REPOSITORY / "scripts" / "render_kubernetes.py"))
RENEW = "scripts/render_kubernetes.py renews it; read the difference"
FOLDERS = [DEPLOY / name for name in ("base", "cluster", "serve", "train")]
OVERLAYS = [DEPLOY / "overlays" / name for name in RENDER["OVERLAYS"]]
SECRETS = {"tandem-secrets", "tandem-ray-token", "tandem-redis", "tandem-tls"}
"""Made by hand (docs/guides/kubernetes.md), and by the overlay for kind."""


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    """What kustomize makes of each folder."""
    return {folder.name: documents(RENDER["kustomized"](folder)) for folder in [*FOLDERS, *OVERLAYS]}


def find(manifests: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a value."""
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(child)


def test_every_manifest_is_valid(rendered: dict[str, list[dict[str, Any]]]) -> None:
    found = {
        f"{folder}: {manifest['kind']} {manifest['metadata']['name']}": wrong
        for folder, manifests in rendered.items()
        for manifest in manifests
        if (wrong := problems(manifest))
    }
    assert found == {}


def test_all_is_in_one_namespace(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for folder, manifests in rendered.items():
        for manifest in manifests:
            in_namespace = manifest["kind"] not in ("Namespace", "PriorityClass")
            wanted = "tandem" if in_namespace else None
            assert manifest["metadata"].get("namespace") == wanted, f"{folder}: {manifest['kind']}"


def test_every_kind_with_a_schema_is_used(rendered: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {manifest["kind"] for manifests in rendered.values() for manifest in manifests}
    assert {name.split("/")[-1] for name in CRDS["kinds"]} <= kinds
    assert {"Ingress", "NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim", "PriorityClass"} <= kinds


@pytest.mark.parametrize(
    ("folder", "kind", "path", "key"),
    [
        ("serve", "RayService", ("spec",), "serveConfigV3"),
        ("serve", "RayService", ("spec", "rayClusterConfig", "autoscalerOptions"), "idleTimeout"),
        ("cluster", "RayCluster", ("spec", "headGroupSpec", "template", "spec", "containers", 0), "livenesProbe"),
        ("train", "RayJob", ("spec", "submitterPodTemplate", "spec"), "restartpolicy"),
        ("train", "ConfigMap", (), "dta"),
        ("base", "NetworkPolicy", ("spec",), "ingres"),
        ("serve", "PodDisruptionBudget", ("spec",), "minAvailabel"),
        ("cpu", "Ingress", ("spec", "rules", 0), "hosts"),
        ("nvidia", "Gateway", ("spec", "listeners", 0), "hostName"),
        ("nvidia", "HTTPRoute", ("spec", "rules", 0), "timeout"),
        ("nvidia", "BackendTrafficPolicy", ("spec", "loadBalancer"), "kind"),
    ],
)
def test_a_misspelt_key_is_found(
    rendered: dict[str, list[dict[str, Any]]], folder: str, kind: str, path: tuple[str | int, ...], key: str
) -> None:
    manifest = copy.deepcopy(next(each for each in rendered[folder] if each["kind"] == kind))
    assert not problems(manifest)
    inner: Any = manifest
    for step in path:
        inner = inner[step]
    inner[key] = "x"
    assert any(key in problem for problem in problems(manifest))


def test_a_value_of_the_wrong_type_is_found(rendered: dict[str, list[dict[str, Any]]]) -> None:
    manifest = copy.deepcopy(find(rendered["serve"], "RayService", "tandem"))
    manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] = "4"
    assert any("maxReplicas" in problem for problem in problems(manifest))


def test_the_ray_clusters_are_those_of_the_code() -> None:
    for path, text in RENDER["generated"]().items():
        assert path.read_text() == text, f"{path}: {RENEW}."


@pytest.mark.parametrize("overlay", RENDER["OVERLAYS"])
def test_an_overlay_renders_as_its_golden(overlay: str) -> None:
    golden = RENDER["GOLDEN"] / f"{overlay}.yaml"
    assert RENDER["kustomized"](DEPLOY / "overlays" / overlay) == golden.read_text(), f"{golden}: {RENEW}."


def pod_specs(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod specs in a manifest: what has containers."""
    yield from (node for node in nodes(manifest) if "containers" in node)


def test_pods_are_what_the_restricted_standard_allows(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for folder, manifests in rendered.items():
        for manifest in manifests:
            for spec in pod_specs(manifest):
                where = f"{folder}: {manifest['kind']}"
                assert spec["securityContext"]["runAsNonRoot"] is True, where
                assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
                assert spec["automountServiceAccountToken"] is False, where
                for container in [*spec["containers"], *spec.get("initContainers", [])]:
                    security = container["securityContext"]
                    assert security["capabilities"] == {"drop": ["ALL"]}, where
                    assert security["allowPrivilegeEscalation"] is False, where
                    assert security["readOnlyRootFilesystem"] is True, where
                    assert "memory" in container["resources"]["limits"], where
                allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
                assert all(volume.keys() - {"name"} <= allowed for volume in spec.get("volumes", [])), where


def test_only_the_autoscaler_has_a_token_of_kubernetes(rendered: dict[str, list[dict[str, Any]]]) -> None:
    cluster = find(rendered["serve"], "RayService", "tandem")["spec"]["rayClusterConfig"]
    options = cluster["autoscalerOptions"]
    assert any(mount["mountPath"] == pods.TOKEN_FOLDER for mount in options["volumeMounts"])
    assert options["securityContext"]["readOnlyRootFilesystem"] is True
    containers = [container for spec in pod_specs(cluster) for container in spec["containers"]]
    assert containers
    assert not any(m["mountPath"] == pods.TOKEN_FOLDER for container in containers for m in container["volumeMounts"])


def test_what_manifests_refer_to_exists(rendered: dict[str, list[dict[str, Any]]]) -> None:
    base = rendered["base"]
    names = {kind: {m["metadata"]["name"] for m in base if m["kind"] == kind} for kind in {m["kind"] for m in base}}
    for folder in ("cluster", "serve", "train"):
        for spec in [spec for manifest in rendered[folder] for spec in pod_specs(manifest)]:
            assert spec["serviceAccountName"] in names["ServiceAccount"]
            assert spec["priorityClassName"] in names["PriorityClass"]
            for volume in spec["volumes"]:
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                assert claim is None or claim in names["PersistentVolumeClaim"]
    site = KubernetesSite()
    assert {*site.secrets, site.token_secret, site.redis_secret} <= SECRETS
    assert site.redis_address is not None and site.redis_address.split(":")[0] in names["Service"]
    kind = {each["metadata"]["name"] for each in rendered["kind"] if each["kind"] == "Secret"}
    assert kind == SECRETS - {"tandem-tls"}
    guide = (REPOSITORY / "docs" / "guides" / "kubernetes.md").read_text()
    assert all(name in guide for name in SECRETS)


def test_network_policies_name_the_ports_of_the_code(rendered: dict[str, list[dict[str, Any]]]) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in rendered["base"] if each["kind"] == "NetworkPolicy"}
    ports = {
        name: {port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])}
        for name, spec in policies.items()
    }
    assert ports["tandem-gateway"] == {pods.SERVE_PORT} == {Settings.model_fields["port"].default}
    assert ports["tandem-operator"] == {pods.DASHBOARD_PORT}
    assert ports["tandem-metrics"] == {pods.METRICS_PORT}
    # Between nodes every port is open, those of HAProxy and of gateways too; from elsewhere none of them is.
    opened = set().union(*ports.values())
    assert not opened & {*HAPROXY_PORTS, *GATEWAY_PORTS, pods.GCS_PORT, pods.CLIENT_PORT, pods.AGENT_PORT}
    assert policies["tandem-default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ray = policies["tandem-ray"]
    assert ray["ingress"] == [{"from": [{"podSelector": ray["podSelector"]}]}]
    out = {port["port"] for rule in policies["tandem-egress"]["egress"] for port in rule["ports"]}
    assert out == {53, 443, 5432, 6379, 6443}


def test_selectors_find_the_pods_as_kuberay_labels_them(rendered: dict[str, list[dict[str, Any]]]) -> None:
    # Of a group's `labels` KubeRay makes labels of its pods; it adds the type of the node.
    cluster = find(rendered["serve"], "RayService", "tandem")["spec"]["rayClusterConfig"]
    worker = {**cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]}
    worker |= {**cluster["workerGroupSpecs"][0]["labels"], "ray.io/node-type": "worker", "ray.io/is-ray-node": "yes"}
    head = {**cluster["headGroupSpec"]["template"]["metadata"]["labels"]}
    head |= {"ray.io/node-type": "head", "ray.io/is-ray-node": "yes"}
    wanted = {
        "tandem-gateway": (worker,), "tandem-operator": (head,), "tandem-metrics": (head, worker), "tandem-ray": (head, worker),
        "tandem-egress": (head, worker), "serve-tandem-serve": (worker,), "serve-tandem-head": (head,),
    }  # fmt: skip
    for manifest in [*rendered["base"], *rendered["serve"]]:
        if manifest["kind"] not in ("NetworkPolicy", "PodDisruptionBudget"):
            continue
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        selector = spec.get("podSelector", spec.get("selector", {})).get("matchLabels", {})
        chosen = tuple(labels for labels in (head, worker) if selector.items() <= labels.items())
        assert name == "tandem-default-deny" or chosen == wanted[name], name


def test_routes_lead_to_the_service_that_kuberay_makes(rendered: dict[str, list[dict[str, Any]]]) -> None:
    service = f"{find(rendered['serve'], 'RayService', 'tandem')['metadata']['name']}-serve-svc"
    ingress = find(rendered["cpu"], "Ingress", "tandem")
    (rule,) = ingress["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": service, "port": {"number": pods.SERVE_PORT}}
    assert ingress["spec"]["tls"] and ingress["metadata"]["annotations"]["haproxy.org/load-balance"] == "leastconn"
    route = find(rendered["nvidia"], "HTTPRoute", "tandem")
    (rule,) = route["spec"]["rules"]
    assert (rule["backendRefs"][0]["name"], rule["backendRefs"][0]["port"]) == (service, pods.SERVE_PORT)
    assert rule["timeouts"] == {"request": "0s"}
    policy = find(rendered["nvidia"], "BackendTrafficPolicy", "tandem")
    assert policy["spec"]["loadBalancer"] == {"type": "LeastRequest"}


def test_pods_with_gpus_ask_for_them(rendered: dict[str, list[dict[str, Any]]]) -> None:
    service = find(rendered["nvidia"], "RayService", "tandem")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_no_secret_is_in_git_but_that_for_kind() -> None:
    for path in DEPLOY.rglob("*.yaml"):
        text = path.read_text()
        kinds = {document.get("kind") for document in yaml.safe_load_all(text) if isinstance(document, dict)}
        assert "Secret" not in kinds, path
        assert "secretGenerator" not in text or path.parent.name == "kind", path


def test_each_schema_names_its_source_and_licence() -> None:
    assert set(CRDS["sources"]) == set(CRDS["kinds"])
    assert all(source.endswith(", Apache-2.0") for source in CRDS["sources"].values())
    assert Path(DEPLOY / "schemas" / "crds.json").stat().st_size < 200_000
