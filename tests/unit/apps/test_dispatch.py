"""Dispatch of an app's jobs without a cluster: what it asks and what it leaves open."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from tandem.apps import dispatch
from tandem.config import FilesConfig, SchedulingConfig
from tandem.config.serving.batches import BatchesConfig
from tandem.config.serving.jobs import JobsConfig
from tandem.jobs.work.leader import DISPATCHER, Leadership
from tandem.registry import Registry

DEADLINE_S = 120.0


def open_databases(folder: Path) -> list[str]:
    """Paths of this process's open files in a folder."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    return [path for path in found if path.startswith(str(folder))]


def leads(registry: Registry) -> bool:
    """Whether a dispatcher leads."""
    with Leadership(registry.url) as leadership:
        term = leadership.acquire(DISPATCHER, "test", 0.0)
        return term is None


def test_without_jobs_the_cluster_is_asked_for_the_capacity_record_alone_and_at_the_end_no_connection_is_left(
    tandem_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "START_AFTER_S", 0.0)
    stop = threading.Event()
    with Registry.open() as registry:
        arguments = (registry.address, FilesConfig(), BatchesConfig(), SchedulingConfig(), JobsConfig(), stop)
    assert open_databases(tandem_home) == []
    thread = threading.Thread(target=dispatch.dispatch_jobs, args=arguments)
    with caplog.at_level(logging.WARNING):
        thread.start()
        deadline = time.monotonic() + DEADLINE_S
        while not leads(registry):
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.1)
        assert open_databases(tandem_home)
        stop.set()
        thread.join()
    assert open_databases(tandem_home) == []
    assert not leads(registry), "the lead is given up"
    # There is no Ray here.
    (asked,) = caplog.messages
    assert "It is tried again in 10 s." in asked
