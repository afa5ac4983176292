"""Directory deployment: soft state of replicas and of waiting requests, and the pinned adapters of each base.

Ray places and restarts it and says where it listens (`address`); reports, updates and limits pass over its own connections
(`directory_protocol`). A restarted directory is complete again after a few heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.engine.protocol import AdapterRef
from tandem.limits import Answer, Exchange, LimitLedger, Moment
from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import Snapshot
from tandem.serve import cluster_store
from tandem.serve.app_tls import Authority, Enrollment, Identity
from tandem.serve.directory_protocol import DirectoryAddress
from tandem.serve.directory_server import DirectoryServer
from tandem.serve.directory_state import HEARTBEAT_S, SILENT_AFTER_S, DirectoryState, WaitingCounts
from tandem.serve.listen import internal_port_on_node, is_loopback

WARM_UP_S = 3 * SILENT_AFTER_S
"""Seconds after its start in which a directory may not have heard from all replicas."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PinnedAdapters:
    """Pinned adapters of each base, read from the registry when it has changed."""

    registry: Registry
    pins: dict[str, tuple[AdapterRef, ...]] = field(default_factory=dict)
    _revision: int | None = None

    def read(self, bases: set[str]) -> dict[str, tuple[AdapterRef, ...]]:
        """The pinned adapters of these bases; one small query where nothing has changed. RegistryError if the database fails."""
        # A change after this increases the revision, and is read next time.
        revision = self.registry.revision()
        if revision != self._revision or bases != self.pins.keys():
            self.pins = {
                base: tuple(AdapterRef.of(record) for record in self.registry.pinned(base) if not record.dora)
                for base in sorted(bases)
            }
            self._revision = revision
        return self.pins


class Directory:
    """The directory's Serve deployment. Replicas and gateways ask it for its `address`, gateways also call `demand`."""

    def __init__(
        self,
        wake: Callable[[str], Any] | None = None,
        registry: RegistryAddress | None = None,
        host: str | None = None,
        tls: bool = True,
    ) -> None:
        """`wake` starts the first replica of a deployment; it is awaited, and called again only when it has ended.

        `registry`: its pinned adapters are read for all replicas. `host`: address to listen on; None: the node's. `tls`:
        whether the app's servers speak TLS, unless this address is on loopback.
        """
        self._limits = LimitLedger()
        self._state = DirectoryState()
        self._demand = WaitingCounts()
        self._started_at = time.monotonic()
        self._server = DirectoryServer(self._state, self._demand, self._is_complete, self._apply_limits)
        self._host = host
        self._address: DirectoryAddress | None = None
        self._start_lock = asyncio.Lock()
        self._tls = tls
        self._authority: Authority | None = None
        self._authority_lock = asyncio.Lock()
        self._load_authority = load_authority if wake is None else Authority.create
        self._wake = wake or call_through_serve
        self._wake_tasks: dict[str, asyncio.Task[None]] = {}
        self._registry = registry
        self._pin_task: asyncio.Task[None] | None = None
        if wake is None:
            internal_port_on_node()

    async def address(self) -> DirectoryAddress:
        """The address on which it listens; the first call starts the server."""
        async with self._start_lock:
            if self._address is None:
                tls = Identity.signed_by(await self._open_authority()).server() if self._requires_tls() else None
                self._address = await self._server.start(self._own_host(), tls)
                if self._registry is not None:
                    self._pin_task = asyncio.create_task(self._follow_pins(self._registry))
        return self._address

    async def enroll(self, request: bytes) -> Enrollment:
        """Sign the certificate of a process of this app (`app_tls.Membership`). ValueError for an invalid request."""
        authority = await self._open_authority()
        return Enrollment(
            certificate=authority.sign(request), authority=authority.certificate, required=self._requires_tls()
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._pin_task is not None:
            self._pin_task.cancel()
        await self._server.stop()

    async def watch(self, version: int) -> Snapshot:
        """All replicas, for tools: at once if their version is not `version`, else at the next change or after `HEARTBEAT_S`."""
        self._state.mark_silent(time.monotonic())
        if version == self._state.version:
            await self._server.changed(HEARTBEAT_S)
        return self._state.snapshot(complete=self._is_complete())

    async def demand(self, gateway: str, waiting: dict[str, int]) -> None:
        """Apply a gateway's numbers of waiting requests by deployment; starts a replica of deployments that have none."""
        now = time.monotonic()
        self._demand.update(gateway, waiting, now)
        ready = self._state.ready_deployments()
        for deployment, count in waiting.items():
            if count > 0 and deployment not in ready and deployment not in self._wake_tasks:
                task = self._wake_tasks[deployment] = asyncio.create_task(self._wake_up(deployment))
                task.add_done_callback(functools.partial(self._wake_ended, deployment))
        for deployment, task in self._wake_tasks.items():
            # No request waits any more, so no replica need start.
            if not self._demand.total(deployment, now):
                task.cancel()

    async def _open_authority(self) -> Authority:
        async with self._authority_lock:
            if self._authority is None:
                self._authority = await asyncio.to_thread(self._load_authority)
        return self._authority

    def _requires_tls(self) -> bool:
        return self._tls and not is_loopback(self._own_host())

    def _own_host(self) -> str:
        return self._host or _node_address()

    def _apply_limits(self, exchange: Exchange) -> Answer:
        return self._limits.exchange(exchange, Moment.now())

    def _is_complete(self) -> bool:
        return time.monotonic() - self._started_at >= WARM_UP_S

    async def _follow_pins(self, address: RegistryAddress) -> None:
        """Read the pinned adapters whenever the registry has changed; they stay while the database does not answer."""
        pinned = PinnedAdapters(Registry.at(address))
        has_failed = False
        while True:
            try:
                # In a thread: a database that hangs must not block heartbeats.
                self._server.set_pins(await asyncio.to_thread(pinned.read, self._server.bases()))
                has_failed = False
            except Exception as error:  # noqa: BLE001 - the next read may succeed
                if not has_failed:
                    log.warning("Pinned adapters could not be read (%s); those that are known stay.", error)
                has_failed = True
            await asyncio.sleep(HEARTBEAT_S)

    def _wake_ended(self, deployment: str, task: asyncio.Task[None]) -> None:
        del self._wake_tasks[deployment]

    async def _wake_up(self, deployment: str) -> None:
        # A deployment that is being deleted does not answer; while requests wait, it is called again.
        with contextlib.suppress(Exception):
            await self._wake(deployment)


def load_authority() -> Authority:
    """The authority of the app of this process, made when it is asked for the first time in the cluster."""
    from ray import serve

    key = f"authority:{serve.get_replica_context().app_name}"
    return Authority.from_pem(cluster_store.get_or_put(key, Authority.create().to_pem()))


async def call_through_serve(deployment: str) -> None:
    """Call a deployment's replica. Without one the call waits, and Serve starts one if autoscaling allows."""
    from ray import serve

    await _handle(deployment, serve.get_replica_context().app_name).woken.remote()


@functools.cache
def _handle(deployment: str, app: str) -> Any:
    # Each handle has a router with threads of its own: one for each deployment is enough.
    from ray import serve

    return serve.get_deployment_handle(deployment, app)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
