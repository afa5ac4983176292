"""Slots for nodes beside each other on a machine: no two hold the same one."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from tandem.cluster import slots
from tandem.cluster.node import SLOTS, WORKER_PORTS, worker_ports
from tandem.cluster.slots import hold_slot
from tandem.errors import ClusterError


@pytest.fixture(autouse=True)
def free_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files of the test's own, and ports that nothing listens on."""
    monkeypatch.setattr(slots, "slots_folder", lambda: tmp_path / "slots")
    monkeypatch.setattr(slots, "_are_free", lambda ports: True)


def test_the_slots_share_the_worker_ports() -> None:
    assert [port for slot in range(SLOTS) for port in worker_ports(slot)] == list(WORKER_PORTS)


def test_jobs_whose_numbers_prefer_the_same_slot_get_different_ones() -> None:
    with hold_slot(27) as first, hold_slot(27 + SLOTS) as second:
        assert (first, second) == (7, 8)
    with hold_slot(27) as again:
        assert again == 7


def test_a_slot_whose_ports_another_user_has_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_are_free", lambda ports: ports != worker_ports(19))
    with hold_slot(19) as slot:
        assert slot == 0


def test_a_full_machine_is_said() -> None:
    with contextlib.ExitStack() as stack:
        assert {stack.enter_context(hold_slot(3)) for _ in range(SLOTS)} == set(range(SLOTS))
        with pytest.raises(ClusterError, match=f"None of the {SLOTS} slots"), hold_slot(3):
            pass


def test_a_port_that_is_listened_on_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not slots._are_free(range(port, port + 1))
    assert slots._are_free(range(port, port + 1))
