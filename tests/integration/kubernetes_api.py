"""Kubernetes without a cluster: checks of manifests by schema, and an HTTP server that speaks the part of the API that we use.

The server is no kube-apiserver: there is none in the package registries that these tests may use. It is strict as one is in what
our client can get wrong: discovery, paths, the content type and parameters of server-side apply, unknown fields and wrong types
(by the schemas of the kinds), fields of other managers, namespaces, tokens, label selectors and deletion.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import kubernetes_validate
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERNETES_VERSION = "1.37"
CRDS = json.loads((REPOSITORY / "deploy" / "kubernetes" / "schemas" / "crds.json").read_text())
RESOURCES = {
    "v1": {"configmaps": "ConfigMap"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "ray.io/v1": {"rayclusters": "RayCluster", "rayservices": "RayService", "rayjobs": "RayJob"},
}
"""What the server offers: by group and version, the plural of each kind."""
APPLY = "application/apply-patch+yaml"


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, by the schema of its kind; an unknown field is."""
    schema = CRDS["kinds"].get(f"{manifest['apiVersion']}/{manifest['kind']}")
    if schema is None:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
        except jsonschema.ValidationError as error:
            return [f"{error.json_path}: {error.message}"]
        return []
    validator = jsonschema.Draft202012Validator({**schema, "$defs": CRDS["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def documents(text: str) -> list[dict[str, Any]]:
    """The manifests of a YAML file."""
    return [document for document in yaml.safe_load_all(text) if document]


class KubernetesApi:
    """The server, on a free port of loopback, with one namespace and one token."""

    def __init__(self, resources: dict[str, dict[str, str]] | None = None) -> None:
        self.token, self.namespace = "a-token", "tandem"
        self.resources = RESOURCES if resources is None else resources
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        """By group and version, plural, and name."""
        self.managers: dict[tuple[str, str, str], str] = {}
        self.applied: list[dict[str, list[str]]] = []
        """The parameters of each apply."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> KubernetesApi:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path, *, token: str | None = None) -> Path:
        """A kubeconfig for it, with a context for the right token and one, `stranger`, for another."""
        users = {"me": token or self.token, "stranger": "another-token"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "me",
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": name, "user": {"token": value}} for name, value in users.items()],
            "contexts": [{"name": name, "context": {"cluster": "test", "user": name}} for name in users],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body for a request."""
        url = urlsplit(target)
        if headers.get("Authorization") != f"Bearer {self.token}":
            return failure(401, "Unauthorized")
        found = self._discovery(url.path) if method == "GET" else None
        if found is not None:
            return 200, found
        group_version, namespace, plural, name = _split(url.path)
        if plural not in self.resources.get(group_version, {}):
            return failure(404, "the server could not find the requested resource")
        if namespace != self.namespace:
            return failure(404, f'namespaces "{namespace}" not found')
        query = parse_qs(url.query)
        if method == "PATCH":
            return self._apply(group_version, plural, name, query, headers, body)
        if name == "" and method == "GET":
            return 200, self._list(group_version, plural, query)
        key = (group_version, plural, name)
        if key not in self.objects:
            return failure(404, f'{plural}.{group_version.partition("/")[0]} "{name}" not found')
        if method == "DELETE":
            del self.objects[key]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        return 200, self.objects[key]

    def _discovery(self, path: str) -> dict[str, Any] | None:
        groups = [name for name in self.resources if name != "v1"]
        lists = {"/api/v1": "v1", **{f"/apis/{name}": name for name in groups}}
        if path == "/version":
            return {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
        if path == "/apis":
            versions = [{"groupVersion": name, "version": name.partition("/")[2]} for name in groups]
            listed = [
                {"name": version["groupVersion"].partition("/")[0], "versions": [version], "preferredVersion": version}
                for version in versions
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        if path in lists:
            verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
            listed = [
                {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
                for plural, kind in self.resources[lists[path]].items()
            ]
            return {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": lists[path],
                "resources": listed,
            }
        return None

    def _list(self, group_version: str, plural: str, query: dict[str, list[str]]) -> dict[str, Any]:
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        items = [
            item
            for (version, name, _), item in self.objects.items()
            if (version, name) == (group_version, plural)
            and wanted.items() <= item["metadata"].get("labels", {}).items()
        ]
        kind = self.resources[group_version][plural]
        return {"apiVersion": group_version, "kind": f"{kind}List", "metadata": {}, "items": items}

    def _apply(
        self, group_version: str, plural: str, name: str, query: dict[str, list[str]], headers: Any, body: bytes
    ) -> tuple[int, dict[str, Any]]:
        if headers.get("Content-Type") != APPLY:
            return failure(415, f"the content type must be {APPLY}")
        if "fieldManager" not in query:
            return failure(422, "fieldManager is required for apply patch")
        manifest = yaml.safe_load(body)
        if (manifest["apiVersion"], manifest["kind"]) != (group_version, self.resources[group_version][plural]):
            return failure(400, "the object does not match the path")
        if manifest["metadata"]["name"] != name or manifest["metadata"].get("namespace") != self.namespace:
            return failure(400, "the name or namespace of the object does not match the path")
        if query.get("fieldValidation") != ["Strict"]:
            return failure(400, "this server wants fieldValidation=Strict")
        if found := problems(manifest):
            return failure(422, f"{manifest['kind']} {name!r} is invalid: {'; '.join(found)}")
        key = (group_version, plural, name)
        manager = query["fieldManager"][0]
        if self.managers.get(key, manager) != manager and query.get("force") != ["true"]:
            return failure(409, f"conflict with {self.managers[key]!r}: .spec")
        self.applied.append(query)
        if query.get("dryRun") != ["All"]:
            self.objects[key] = manifest
            self.managers[key] = manager
        return 200, manifest


class _Handler(BaseHTTPRequestHandler):
    api: KubernetesApi
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.api.answer(self.command, self.path, self.headers, body)
        encoded = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    do_GET = do_PATCH = do_DELETE = _answer  # noqa: N815 - names of the library

    def log_message(self, *arguments: object) -> None:
        """Nothing: the tests read the objects."""


def failure(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An answer that is an error, as the API sends them."""
    return status, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "message": message}


def _split(path: str) -> tuple[str, str, str, str]:
    """Group and version, namespace, plural, and name (or nothing) of `/apis/GROUP/VERSION/namespaces/NAMESPACE/PLURAL/NAME`."""
    prefix, *rest = path.strip("/").split("/")
    group_version, rest = (rest[0], rest[1:]) if prefix == "api" else ("/".join(rest[:2]), rest[2:])
    if len(rest) < 3 or rest[0] != "namespaces":
        return group_version, "", "", ""
    return group_version, rest[1], rest[2], rest[3] if len(rest) > 3 else ""
