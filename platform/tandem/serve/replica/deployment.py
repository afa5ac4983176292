"""Engine replica: a Serve deployment whose engine serves HTTP on a port of its own.

Serve starts, checks and replaces it; requests do not pass through Serve's handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import serve

from tandem.cluster.ports import free_ports
from tandem.cluster.reaper import Reaper
from tandem.engine.create import create_engine
from tandem.engine.engines import find_engine
from tandem.engine.protocol import AdapterRef
from tandem.errors import EngineError, RegistryError, RegistryUnreachableError
from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import HeartbeatReply, ReplicaRecord, ServedModel, State
from tandem.secret_values import resolve_references
from tandem.serve.app_tls import STARTING_PATIENCE_S, Membership
from tandem.serve.directory_link import DirectoryClient, ReplicaReporter
from tandem.serve.engine_spec import engine_spec
from tandem.serve.listen import internal_port_on_node
from tandem.serve.replica.adapter_checks import AdapterChecker
from tandem.serve.replica.files import with_files
from tandem.serve.replica.host import EngineHost
from tandem.serve.replica.logs import serve_log_kept
from tandem.serve.replica.sigterm import drain_on_sigterm
from tandem.serve.replica.stall import StallDetector
from tandem.serve.replica.start_log import StartLog
from tandem.serve.replica.startup import StartupTimer
from tandem.settings import export
from tandem.usage import UsageStore, UsageWriter

STOP_S = 15.0
"""Seconds that an idle engine may take to stop."""
FIRST_REPORT_TIMEOUT_S = 2.0
"""Seconds that a new replica waits until the directory knows it."""
GRACE_BEFORE_DRAIN_S = 0.5
"""Seconds in which a stopping replica still takes requests of gateways that have not got its new state yet."""


class EngineReplica:
    """One engine. `directory`: handle of the app's directory."""

    # Serve awaits an asynchronous constructor.
    async def __init__(  # type: ignore[misc]
        self, model: ServedModel, directory: Any, registry: RegistryAddress | None = None, drain_timeout_s: float = 30.0
    ) -> None:
        """Load the model; raises ConfigError or EngineError with the reason if that cannot work."""
        self._started_at, startup = time.time(), StartupTimer()
        startup.done("process")
        if model.uri is not None:
            model = await asyncio.to_thread(with_files, model)
            startup.done("files")
        self._model = model
        self._drain_timeout_s = drain_timeout_s
        self._id = serve.get_replica_context().replica_id.unique_id
        self._state: State = "ready"
        self._stall = StallDetector(model.config.stuck_after_s)
        membership = Membership(directory.enroll.remote, STARTING_PATIENCE_S)
        self._reporter = ReplicaReporter(
            DirectoryClient(directory.address.remote, membership.client), self.record, self._directory_answered
        )
        self._pins: tuple[AdapterRef, ...] | None = None
        self._reaper = Reaper.of_children()
        drain_on_sigterm()
        internal_port_on_node()
        loop = asyncio.get_running_loop()
        _check_placement(model)
        host = ray.util.get_node_ip_address()
        if registry is not None:
            await asyncio.to_thread(check_registry, registry, host)
        if model.config.prefill is not None:
            export(find_engine(model.config.engine).kv_transfer.environment(host, free_ports(1)[0]), override=True)
        self._usage = UsageWriter(UsageStore.at(registry)) if registry is not None else None
        tls = await membership.server()
        start_log = StartLog(model.deployment, find_engine(model.config.engine), resolve_references(model.config.env))
        # Importing vLLM takes seconds: outside the loop, so that Serve's controller is answered meanwhile.
        with serve_log_kept():
            engine = await asyncio.to_thread(create_engine, engine_spec(model))
            startup.done("imports")
            self._host = EngineHost(
                engine,
                max_adapters=model.config.max_adapters,
                max_cached=model.config.cached_adapters,
                prepare=AdapterChecker(Path(model.path) if model.path else None, model.config.max_lora_rank),
                host=host,
                on_change=lambda: _call_in_loop(loop, self._reporter.changed),
                record_usage=self._usage.add if self._usage else None,
                tls=tls,
            )
            try:
                await self._host.start()
            except EngineError as error:
                raise start_log.with_engine_output(error) from None
        if self._usage is not None:
            self._usage.start()
        startup.done("engine")
        self._startup = tuple(startup.phases.items())
        # Serve stops an old replica when this constructor returns: gateways must know this one by then.
        await self._reporter.start(FIRST_REPORT_TIMEOUT_S)

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        if not self._reporter.running:
            raise EngineError(f"This replica of {self._model.id} sends no heartbeats any more.")
        if not self._host.alive:
            self._reporter.changed()
            raise EngineError(f"The engine of {self._model.id} has died.")
        if self._is_stuck():
            self._reporter.changed()
            idle_s = self._stall.idle_s(time.monotonic())
            raise EngineError(
                f"The engine of {self._model.id} has work and has ended no step for {idle_s:.0f} s (stuck_after_s is "
                f"{self._model.config.stuck_after_s:g})."
            )

    def _is_stuck(self) -> bool:
        self._stall.observe(self._host.stats(), time.monotonic())
        return self._stall.is_stuck(time.monotonic())

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve for autoscaled models; read by `autoscale.EnginePolicy`."""
        stats = self._host.stats()
        return {
            "waiting": stats.waiting + self._host.waiting,
            "running": stats.running,
            "kv_usage": stats.kv_usage,
            "ttft_s": stats.ttft_s,
            "max_running": stats.max_running,
            "held": self._reporter.reply.waiting,
        }

    def woken(self) -> None:
        """Called by the directory when requests wait and no replica is ready; returns once a replica runs."""

    def record(self) -> ReplicaRecord:
        """The record for the directory."""
        stats = self._host.stats()
        return ReplicaRecord(
            id=self._id,
            pool=self._model.pool,
            deployment=self._model.deployment,
            url=self._host.url,
            token=self._host.token,
            state="dead" if not self._host.alive else "stuck" if self._is_stuck() else self._state,
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
        """Called by Serve to stop the replica: drains it and ends all its processes."""
        if not hasattr(self, "_startup"):
            return
        self._state = "draining"
        self._reporter.report()
        await asyncio.sleep(GRACE_BEFORE_DRAIN_S)
        # Heartbeats continue meanwhile: gateways would cut the streams of a silent replica.
        await self._host.drain(0.0 if self._is_stuck() else self._drain_timeout_s)
        if self._usage is not None:
            await self._usage.stop()
        await self._reporter.leave()
        self._reaper.close()

    def _directory_answered(self, reply: HeartbeatReply) -> None:
        # While the directory has not read the registry, the pinned adapters stay.
        pins = reply.pins
        if pins is not None and pins != (self._pins or ()) and self._model.config.max_adapters:
            self._pins = pins
            self._host.set_pinned(pins)


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


def _call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(function)


def _check_placement(model: ServedModel) -> None:
    group = ray.util.get_current_placement_group()
    resources = find_engine(model.config.engine).resources
    if group is not None and resources.placement(model.config, "models[]").bundles:
        nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        resources.check_nodes(group.bundle_specs, nodes, model.config.engine_args)
