"""Objects of Tandem in a Kubernetes cluster: applied, listed and deleted by Kubernetes' official client."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.cluster.kubernetes.manifests import (
    API_VERSION,
    BUDGET_API_VERSION,
    BUDGET_KIND,
    KINDS,
    budget_names,
    config_map_of,
)
from tandem.cluster.kubernetes.pods import LABELS, Manifest
from tandem.config.kubernetes import KubernetesSite
from tandem.errors import ClusterError, EnvironmentProblem
from tandem.settings import variable

DEFAULT_KUBECONFIG = Path("~/.kube/config")
FIELD_MANAGER = "tandem"
"""Under this name Kubernetes remembers which fields are ours: those that others have set stay."""
REQUEST_TIMEOUT_S = 30.0
LABEL_SELECTOR = ",".join(f"{name}={value}" for name, value in LABELS.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A cluster, app or job of Tandem, as the operator sees it."""

    what: str
    """A key of KINDS."""
    name: str
    state: str
    message: str = ""


class Kubernetes:
    """One namespace of a Kubernetes cluster."""

    def __init__(self, site: KubernetesSite) -> None:
        """ClusterError if there is no kubeconfig for it, or no answer; EnvironmentProblem without the client's package."""
        try:
            from kubernetes import client, config, dynamic
        except ImportError as error:
            raise EnvironmentProblem(
                "Kubernetes' client is not installed here. Run `pip install 'tandem[kubernetes]'`; `tandem kubernetes render` "
                "works without it, for `kubectl apply -f -`."
            ) from error
        self.namespace = site.namespace
        configuration = client.Configuration()
        kubeconfig = variable("KUBECONFIG")
        inside = variable("KUBERNETES_SERVICE_HOST") and not kubeconfig and not DEFAULT_KUBECONFIG.expanduser().exists()
        try:
            if inside:
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(kubeconfig, site.context, client_configuration=configuration)
        except config.ConfigException as error:
            raise ClusterError(
                f"There is no access to a Kubernetes cluster: {str(error).rstrip('.')}. Set KUBECONFIG, and --site-set "
                "context=NAME for another context than the current one; `kubectl config get-contexts` lists them."
            ) from error
        configuration.retries = False
        self._host = configuration.host
        with self._errors(), tempfile.TemporaryDirectory() as folder:
            # The client keeps what the API offers in a file that other users could write, unless it is told of another.
            self._client = dynamic.DynamicClient(client.ApiClient(configuration), str(Path(folder) / "discovery.json"))

    def apply(self, manifests: list[Manifest], *, dry_run: bool = False, force: bool = False) -> None:
        """Apply manifests by server-side apply, with strict validation: a field that the API does not know is an error.

        `dry_run`: the API server validates and admits them, and keeps nothing. `force`: fields that others manage are taken over;
        without it they are a ClusterError.
        """
        query = [("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict"), ("force", str(force).lower())]
        for manifest in manifests:
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            with self._errors(f"{kind} {name}"):
                self._resource(manifest["apiVersion"], kind).server_side_apply(
                    body=manifest,
                    namespace=self.namespace,
                    query_params=[*query, *([("dryRun", "All")] if dry_run else [])],
                    _request_timeout=REQUEST_TIMEOUT_S,
                )

    def runs(self) -> list[RunSummary]:
        """The clusters, apps and jobs that were submitted to this namespace, by kind and name."""
        found = []
        for what, kind in KINDS.items():
            with self._errors(kind):
                listed = self._resource(API_VERSION, kind).get(
                    namespace=self.namespace, label_selector=LABEL_SELECTOR, _request_timeout=REQUEST_TIMEOUT_S
                )
            # The cluster of an app or a job belongs to it, and has its labels.
            items = [item for item in listed.to_dict()["items"] if not item["metadata"].get("ownerReferences")]
            found += [summary(what, item) for item in sorted(items, key=lambda item: str(item["metadata"]["name"]))]
        return found

    def delete(self, what: str, name: str) -> None:
        """Delete a cluster, app or job with all that the operator has made of it; ClusterError if there is none."""
        self._delete(API_VERSION, KINDS[what], name)
        for budget in budget_names(what, name):
            self._delete(BUDGET_API_VERSION, BUDGET_KIND, budget, missing_ok=True)
        if what == "train":
            self._delete("v1", "ConfigMap", config_map_of(name), missing_ok=True)

    def _delete(self, api_version: str, kind: str, name: str, *, missing_ok: bool = False) -> None:
        from kubernetes.dynamic.exceptions import NotFoundError

        with self._errors(f"{kind} {name}"):
            try:
                self._resource(api_version, kind).delete(
                    name=name,
                    namespace=self.namespace,
                    propagation_policy="Foreground",
                    _request_timeout=REQUEST_TIMEOUT_S,
                )
            except NotFoundError:
                if not missing_ok:
                    raise

    def _resource(self, api_version: str, kind: str) -> Any:
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        try:
            return self._client.resources.get(api_version=api_version, kind=kind)
        except ResourceNotFoundError as error:
            raise ClusterError(
                f"{self._host} does not know {kind} of {api_version}: the KubeRay operator is not installed there, or an older "
                "one. docs/guides/kubernetes.md says how to install it."
            ) from error

    @contextlib.contextmanager
    def _errors(self, what: str = "") -> Iterator[None]:
        """Raise what goes wrong in a block as a ClusterError with the next step."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise ClusterError(refusal(what or self._host, self.namespace, error.status, error.body)) from error
        except HTTPError as error:
            raise ClusterError(
                f"The Kubernetes API at {self._host} does not answer: {error}. Check the cluster and the kubeconfig "
                "(`kubectl cluster-info`)."
            ) from error


def refusal(what: str, namespace: str, status: int | None, body: str | bytes | None) -> str:
    """A message about an answer of the API server that is an error. Pure."""
    reason = _message(body) or f"status {status}"
    if status == 401:
        return f"Kubernetes does not know who asks ({reason}). Renew the kubeconfig's credentials."
    if status == 403:
        return f"{what}: Kubernetes forbids it: {reason}. Ask for the right to it in the namespace {namespace}."
    if status == 404:
        return (
            f"{what} is not in the namespace {namespace}: {reason}. `tandem kubernetes status` lists all. A namespace is made "
            "by `kubectl apply -k deploy/kubernetes/base`."
        )
    if status == 409:
        return f"{what}: somebody else manages fields of it: {reason}. --force takes them over."
    return f"{what}: Kubernetes refused it: {reason}."


def _message(body: str | bytes | None) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(body or "{}").get("message") or "").rstrip(".")
    return ""


def summary(what: str, item: Mapping[str, Any]) -> RunSummary:
    """A run's summary, of its object as the API server returns it. Pure."""
    status = item.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    if what == "train":
        state = status.get("jobStatus") or status.get("jobDeploymentStatus") or "new"
        message = status.get("message") or ""
    elif what == "serve":
        ready = conditions.get("Ready", {})
        state = "ready" if ready.get("status") == "True" else "starting"
        message = _app_messages(status) or ("" if state == "ready" else str(ready.get("message") or ""))
    else:
        state = status.get("state") or "starting"
        message = status.get("reason") or ""
    return RunSummary(what=what, name=item["metadata"]["name"], state=str(state).lower(), message=message)


def _app_messages(status: Mapping[str, Any]) -> str:
    """Serve's messages about apps that do not run."""
    apps = (status.get("activeServiceStatus") or {}).get("applicationStatuses") or {}
    apps = apps or (status.get("pendingServiceStatus") or {}).get("applicationStatuses") or {}
    return "; ".join(
        f"{name}: {app.get('message') or app.get('status')}"
        for name, app in sorted(apps.items())
        if app.get("status") != "RUNNING"
    )
