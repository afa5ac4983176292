"""One engine replica: a Serve deployment whose engine speaks HTTP on a port of its own.

Serve starts it, checks it and replaces it; no request passes through Serve's handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

from tandem.cluster import free_ports
from tandem.engine.create import create_engine
from tandem.errors import EngineError, RegistryError, RegistryUnreachableError
from tandem.reaper import Reaper
from tandem.registry import Registry, RegistryAddress
from tandem.serve.adapter_checks import AdapterChecks
from tandem.serve.directory import HEARTBEAT_S
from tandem.serve.disaggregate import environment
from tandem.serve.host import EngineHost
from tandem.serve.listen import internal_port_on_node
from tandem.serve.logs import serve_log_kept
from tandem.serve.pins import Pins
from tandem.serve.placement import check_nodes, place
from tandem.serve.progress import Progress
from tandem.serve.records import HeartbeatReply, ReplicaRecord, ServedModel, State
from tandem.serve.sigterm import drain_on_sigterm
from tandem.serve.spec import engine_spec
from tandem.serve.start_log import StartLog
from tandem.serve.startup import Startup
from tandem.settings import export

STOP_S = 15.0
"""How long an engine may take to end once it is idle."""
LINGER_S = 0.5
"""How long a replica that is to end takes what gateways send before they have heard of it."""


class EngineReplica:
    """Holds one engine. `directory` is the handle of the app's directory."""

    # Serve awaits an asynchronous constructor.
    async def __init__(  # type: ignore[misc]
        self, model: ServedModel, directory: Any, registry: RegistryAddress | None = None, drain_timeout_s: float = 30.0
    ) -> None:
        """Load the model; raises ConfigError or EngineError with the reason if that cannot work."""
        self._started_at, startup = time.time(), Startup()
        startup.done("process")
        self._model = model
        self._directory = directory
        self._drain_timeout_s = drain_timeout_s
        self._reply = HeartbeatReply(waiting=0)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._state: State = "ready"
        self._changed = asyncio.Event()
        self._progress = Progress(model.config.stuck_after_s)
        self._reaper = Reaper.of_children()
        drain_on_sigterm()
        internal_port_on_node()
        loop = asyncio.get_running_loop()
        _check_placement(model)
        host = ray.util.get_node_ip_address()
        if registry is not None:
            await asyncio.to_thread(check_registry, registry, host)
        if model.config.prefill is not None:
            export(environment(host, free_ports(1)[0]), override=True)
        log = StartLog(model.deployment)
        # Importing vLLM takes seconds: outside the loop, so that Serve's controller is answered meanwhile.
        with serve_log_kept():
            engine = await asyncio.to_thread(create_engine, engine_spec(model))
            startup.done("imports")
            self._host = EngineHost(
                engine,
                max_adapters=model.config.max_adapters,
                max_cached=model.config.cached_adapters,
                prepare=AdapterChecks(Path(model.path) if model.path else None, model.config.max_lora_rank),
                host=host,
                on_change=lambda: _set(loop, self._changed),
            )
            try:
                await self._host.start()
            except EngineError as error:
                raise log.explained(error) from None
        startup.done("engine")
        self._startup = tuple(startup.phases.items())
        self._pins = Pins(model.id, lambda: Registry.at(registry)) if registry and model.config.max_adapters else None
        # An old replica ends when Serve knows of this one: gateways must know of it by then.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._tell(), 2.0)
        self._beats = asyncio.create_task(self._beat())
        # Not with the beats: a registry that hangs must not make the replica silent.
        self._pinning = asyncio.create_task(self._follow_pins())

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        if self._beats.done():
            raise EngineError(f"This replica of {self._model.id} tells the directory nothing any more.")
        if not self._host.alive:
            self._changed.set()
            raise EngineError(f"The engine of {self._model.id} has died.")
        if self._stuck():
            self._changed.set()
            idle_s = self._progress.idle_s(time.monotonic())
            raise EngineError(
                f"The engine of {self._model.id} has work and has ended no step for {idle_s:.0f} s (stuck_after_s is "
                f"{self._model.config.stuck_after_s:g})."
            )

    def _stuck(self) -> bool:
        self._progress.see(self._host.stats(), time.monotonic())
        return self._progress.stuck(time.monotonic())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve where the model scales; what `autoscale.EnginePolicy` reads."""
        stats = self._host.stats()
        return {
            "waiting": stats.waiting + self._host.waiting,
            "running": stats.running,
            "kv_usage": stats.kv_usage,
            "ttft_s": stats.ttft_s,
            "max_running": stats.max_running,
            "held": self._reply.waiting,
        }

    def woken(self) -> None:
        """Called when a request found no replica; that this can be answered is the answer."""

    def record(self) -> ReplicaRecord:
        """What the directory is told."""
        stats = self._host.stats()
        return ReplicaRecord(
            id=self._id,
            base=self._model.pool,
            deployment=self._model.deployment,
            url=self._host.url,
            token=self._host.token,
            state="dead" if not self._host.alive else "stuck" if self._stuck() else self._state,
            running=stats.running,
            waiting=stats.waiting + self._host.waiting,
            max_running=stats.max_running,
            kv_usage=round(stats.kv_usage, 4),
            adapters=stats.adapters,
            slots=self._host.in_slots,
            adapter_loads=self._host.adapter_loads,
            pin_problems=self._host.pin_problems,
            started_at=self._started_at,
            startup_s=self._startup,
            tasks=stats.tasks,
        )

    async def __del__(self) -> None:
        """Called by Serve when the replica is to end: drain, and leave nothing behind."""
        if not hasattr(self, "_beats"):
            return
        self._pinning.cancel()
        self._state = "draining"
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._tell(), 2.0)
        await asyncio.sleep(LINGER_S)
        # The beats go on meanwhile: whoever is not heard counts as lost, and gateways give up what it still sends.
        await self._host.drain(0.0 if self._stuck() else self._drain_timeout_s)
        self._beats.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(_answer(self._directory.leave.remote(self._id)), 2.0)
        self._reaper.close()

    async def _beat(self) -> None:
        while True:
            self._changed.clear()
            # A directory that is being replaced does not answer; the next beat finds the new one.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._tell(), 5 * HEARTBEAT_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S)

    async def _follow_pins(self) -> None:
        while self._pins is not None:
            revision = self._reply.registry_revision
            # Where the registry does not answer, what was pinned stays so.
            with contextlib.suppress(Exception):
                if revision is None or not self._pins.is_behind(revision):
                    pass
                elif (wanted := await asyncio.to_thread(self._pins.read, revision)) is not None:
                    self._host.keep(wanted)
            # All replicas hear of a change at once; they do not all ask at once.
            await asyncio.sleep(HEARTBEAT_S * random.uniform(0.5, 1.5))

    async def _tell(self) -> None:
        self._reply = await self._directory.heartbeat.remote(self.record())


def check_registry(address: RegistryAddress, node: str) -> None:
    """RegistryError where the app's registry cannot be used on this node; one that does not answer now is asked again later.

    `node`: this node's address.
    """
    if address.node not in (None, node):
        raise RegistryError(
            f"The app's registry is an SQLite file for the node {address.node}, and this replica is on {node}. Set "
            "TANDEM_DATABASE_URL to a PostgreSQL database (`tandem db upgrade` prepares it), and deploy the app again."
        )
    with contextlib.suppress(RegistryUnreachableError), Registry.at(address) as registry:
        registry.revision()


async def _answer(response: Any) -> Any:
    return await response


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
        loop.call_soon_threadsafe(event.set)


def _check_placement(model: ServedModel) -> None:
    group = ray.util.get_current_placement_group()
    if group is not None and place(model.config).bundles:
        nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        check_nodes(group.bundle_specs, nodes, model.config.engine_args.get("tensor_parallel_size", 1))
