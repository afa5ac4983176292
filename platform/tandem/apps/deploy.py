"""Deployment of an app on the connected Ray cluster: start, rolling change, drain.

Deployments that differ from those of the running app are replaced: new replicas start before old ones stop, and old ones stop
when their streams have ended (docs/adr/0017).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from tandem.apps.build import DIRECTORY_NAME, GATEWAY_NAME, application
from tandem.apps.cluster_view import serve_details
from tandem.apps.plan import AppPlan
from tandem.cluster.capacity import check_nodes
from tandem.cluster.health.cordons import placeable_resources
from tandem.cluster.shared_files import check_same_files
from tandem.config import ServeConfig, from_dict, to_dict
from tandem.engine.engines import find_engine
from tandem.errors import EngineError
from tandem.observability.tracebacks import tandem_error_in
from tandem.serve import cluster_store
from tandem.settings import settings

FAILED = "DEPLOY_FAILED"
POLL_S = 0.2
LAST_BYTES_S = 1.0
"""Seconds for the last bytes of an engine to reach their clients."""
TO_INITIALIZE = re.compile(r"have taken more than \d+s to initialize")
TO_SCHEDULE = re.compile(
    r"to be scheduled\..*Resources required for each replica: (?P<needed>.*?), "
    r"total resources available: (?P<free>.*?)\. Use",
    re.DOTALL,
)
"""Serve's messages about replicas that take long to initialise, or wait for resources."""
FAILED_ATTEMPT = re.compile(r"A replica failed to start with exception\. Retrying(?: (?P<left>\d+) more time\(s\))?\.")


def deploy(planned: AppPlan, *, route_prefix: str = "/", on_message: Callable[[str], None] = lambda text: None) -> None:
    """Deploy an app and wait until every new replica is up, and no longer: old ones may stream on for minutes.

    The app's resolved config is kept with the cluster (`saved_config`). Raises EngineError with the reason if a new replica
    cannot start; old replicas then stay. ClusterError if its nodes do not see the same files. `on_message` gets Serve's messages
    meanwhile, such as that the cluster has no free resources; Serve waits for them without a limit.
    """
    check_files(planned)
    name = planned.app.config.app
    details_before = _details(name)
    reported: set[str] = set()
    target = serve.RunTarget(application(planned), name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)
    while not is_rolled_out(details := _details(name), details_before):
        # The app's status only: a deployment keeps the status of the last change until Serve has begun with this one.
        if details["status"] == FAILED:
            raise EngineError(f"{name} did not start: {failure_reason(name)}")
        for text in sorted(deployment_messages(details) - reported):
            reported.add(text)
            on_message(text)
        time.sleep(POLL_S)
    _save_config(planned.app.config)


def check_capacity(planned: AppPlan) -> None:
    """ClusterError if no node of a cluster that cannot grow could hold a replica: Serve would wait without a limit."""
    nodes = placeable_resources()
    for engine in planned.engines:
        # The workers of a placement group may be on several nodes.
        if not engine.placement.bundles:
            check_nodes(nodes, engine.model.config, f"A replica of {engine.model.name}")


def check_files(planned: AppPlan) -> None:
    """ClusterError that names the nodes from which the home, or the folder of a model, is not to be seen."""
    config = settings()
    folders = [
        folder
        for model in planned.app.models
        if model.path
        and model.uri is None
        and find_engine(model.config.engine).needs_files
        # Nodes download what they lack of the hub's models.
        and not (folder := Path(model.path)).is_relative_to(config.hub_dir)
    ]
    check_same_files(config.root, folders)


def _save_config(config: ServeConfig) -> None:
    deployment = deployment_of(serve_details(), config.app)
    cluster_store.put(_key(config.app), json.dumps({**deployment, "config": to_dict(config)}).encode())


def saved_config(app: str) -> ServeConfig | None:
    """The resolved config of a running app; None if it is not known, or if Ray's `serve deploy` has changed the app since.

    A `serve.run` of another program over the same app is not noticed: Serve keeps the time of the first.
    """
    value = cluster_store.get(_key(app))
    record = json.loads(value) if value else {}
    if not record or not is_same_deployment(record, deployment_of(serve_details(), app)):
        return None
    return from_dict(ServeConfig, record["config"])


def deployment_of(details: Mapping[str, Any], app: str) -> dict[str, Any]:
    """What tells an app's last change from others. `details`: Serve's, of all apps."""
    application = (details.get("applications") or {}).get(app, {})
    return {
        "deployed_at": application.get("last_deployed_time_s"),
        "source": application.get("source"),
        "controller": (details.get("controller_info") or {}).get("worker_id"),
    }


def is_same_deployment(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an app has not been changed since. Pure: `deployment_of`, then and now.

    A controller that has restarted gives every app a new time; then only a change by Ray's `serve deploy` is noticed.
    """
    if saved["deployed_at"] == now["deployed_at"]:
        return True
    has_restarted = (
        None not in (saved.get("controller"), now["controller"]) and saved["controller"] != now["controller"]
    )
    return has_restarted and saved["source"] == now["source"] == "imperative"


def _key(app: str) -> str:
    return f"app:{app}"


def is_rolled_out(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a change of an app is complete except for old replicas that still drain. Pure: Serve's details, now and before.

    Serve begins with a change a moment after the call; a deployment that is not HEALTHY shows that it has.
    """
    deployments, old_deployments = now["deployments"], before["deployments"]
    has_begun = any(deployment["status"] != "HEALTHY" for deployment in deployments.values())
    return now["status"] == "RUNNING" or (
        has_begun and all(_is_replaced(deployment, old_deployments.get(key)) for key, deployment in deployments.items())
    )


def deployment_messages(now: Mapping[str, Any]) -> set[str]:
    """Messages about deployments that are not HEALTHY, one line each. Pure."""
    messages = {
        name: deployment["message"]
        for name, deployment in now["deployments"].items()
        if deployment["status"] != "HEALTHY" and deployment["message"]
    }
    return {text for name, message in messages.items() if (text := _deployment_message(name, message))}


def _deployment_message(deployment: str, message: str) -> str | None:
    # An engine may take more than half a minute to load.
    if TO_INITIALIZE.search(message):
        return None
    if match := TO_SCHEDULE.search(message):
        return (
            f"{deployment} waits for room on the cluster: each replica needs {match['needed']}, and {match['free']} are free. "
            "It starts when there is room: stop something else, add a node, or lower `replicas`."
        )
    if match := FAILED_ATTEMPT.match(message):
        # After the last attempt the deployment's own error has the reason.
        if match["left"] == "0":
            return None
        attempts_left = f" Attempts left: {match['left']}." if match["left"] else ""
        return f"{deployment} did not start: {reason_in(message) or 'Ray has not said why.'}{attempts_left}"
    return message.splitlines()[0]


def reason_in(message: str) -> str:
    """The reason in a deployment's message: the TandemError that a replica raised, without its traceback; else all of it."""
    return tandem_error_in(message) or message.strip()


def _is_replaced(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    if now["status"] == "HEALTHY":
        return True
    states = [replica["state"] for replica in now["replicas"] if replica["state"] != "STOPPING"]
    old_running = _running_replicas(before) if before else set()
    return states == ["RUNNING"] * now["target_num_replicas"] and not _running_replicas(now) & old_running


def drain(name: str, timeout_s: float) -> bool:
    """Delete an app and wait until its engines have answered their requests; False if they have not within `timeout_s`."""
    # Serve reports no replicas of an app that is being deleted. Its gateways stay reachable for some seconds in any case, so
    # they are not waited for.
    deployments = _details(name)["deployments"].items()
    engine_actors = {
        replica["actor_name"]
        for key, deployment in deployments
        if key not in (DIRECTORY_NAME, GATEWAY_NAME)
        for replica in deployment["replicas"]
    }
    serve.delete(name, _blocking=False)
    deadline = time.monotonic() + timeout_s
    while engine_actors := {actor for actor in engine_actors if _is_alive(actor)}:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    time.sleep(LAST_BYTES_S)
    return True


def failure_reason(name: str) -> str:
    """The reason why an app is not running."""
    app = serve.status().applications.get(name)
    if app is None:
        return ""
    messages = [reason_in(deployment.message) for deployment in app.deployments.values() if deployment.message]
    return "\n".join(messages) or (app.message if app.status != ApplicationStatus.RUNNING else "")


def _details(name: str) -> dict[str, Any]:
    # `serve.status` does not list replicas.
    client = _get_global_client()
    apps = client.get_serve_details()["applications"] if client else {}
    return {"status": "NOT_STARTED", "deployments": {}, **apps.get(name, {})}


def _is_alive(actor: str) -> bool:
    try:
        ray.get_actor(actor, namespace="serve")
    except ValueError:
        return False
    return True


def _running_replicas(deployment: Mapping[str, Any]) -> set[str]:
    return {replica["replica_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"}
