"""Gateway deployment: the Serve ingress that runs the gateway's ASGI app against the app's directory and registry."""

from __future__ import annotations

import functools
import gc
import logging
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from tandem.apps.dispatch import job_client
from tandem.cluster.haproxy import has_tls, proxy_secret
from tandem.config import GatewayConfig, RouterConfig
from tandem.gateway.app import create_app
from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import ServedModel
from tandem.serve.app_tls import Membership
from tandem.serve.directory_link import DirectoryClient, DirectoryWatcher, LimitsLink
from tandem.serve.listen import internal_port_on_node, is_loopback, listen_on_node
from tandem.serve.metrics import RayQueueMetrics, latency_histogram
from tandem.serve.replica.deployment import check_registry
from tandem.serve.replica.sigterm import drain_on_sigterm
from tandem.settings import settings

log = logging.getLogger(__name__)


class Gateway:
    """One gateway replica: wires the app of `tandem.gateway` to Serve."""

    def __init__(
        self,
        directory: DeploymentHandle[Any],
        models: tuple[ServedModel, ...],
        config: GatewayConfig,
        registry: RegistryAddress,
        engines: list[DeploymentHandle[Any]],
        router: RouterConfig,
        admin: str | None = None,
    ) -> None:
        """`engines` is not called: Serve makes the deployments of these handles a part of the app.

        `admin`: fingerprint of TANDEM_ADMIN_TOKEN, which is accepted as an admin's key.
        """
        drain_on_sigterm()
        internal_port_on_node()
        listen_on_node(ray.util.get_node_ip_address())
        self._directory = directory
        self._models = models
        self._config = config
        self._registry = registry
        self._router = router
        self._admin = admin

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve in the replica. RegistryError where the app's registry cannot be used on this node."""
        check_registry(self._registry, ray.util.get_node_ip_address())
        if not is_loopback(_public_host()) and not has_tls():
            log.warning("The app listens on %s without TLS: API keys travel in clear. Set listen.tls.", _public_host())
        membership = Membership(self._directory.enroll.remote)
        directory = DirectoryClient(self._directory.address.remote, membership.client)
        app = create_app(
            models=self._models,
            watch=DirectoryWatcher(directory),
            registry=Registry.at(self._registry),
            config=self._config,
            record_latency=latency_histogram(),
            router=self._router,
            admin=self._admin,
            # The gateway listens on its node's address too.
            require_keys=not (is_loopback(_public_host()) and is_loopback(ray.util.get_node_ip_address())),
            metrics=RayQueueMetrics(),
            report_demand=self._report_demand,
            apply_limits=LimitsLink(directory) if self._config.replicas > 1 else None,
            access_log=settings().root / "logs" / f"access-{_replica_id()}.jsonl" if self._config.access_log else None,
            name=_replica_id(),
            server_adds_request_id=True,
            proxy_secret=proxy_secret(),
            engine_tls=membership.client,
            run_logs=functools.partial(job_client, self._registry),
        )
        # What is here now stays: the collector would look at all of it again and again, for tens of milliseconds each time.
        gc.collect()
        gc.freeze()
        return app

    async def _report_demand(self, waiting: dict[str, int]) -> None:
        await self._directory.demand.remote(_replica_id(), waiting)


def _public_host() -> str:
    """The address of Serve's public listener."""
    client = _get_global_client()
    assert client is not None
    return str(client.http_config.host or "")


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)
