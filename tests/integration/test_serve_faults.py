"""Engines and replicas that die: what clients see meanwhile, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import httpx
import openai
import psutil
import pytest
from serve_fixtures import Served, process_of

from tandem.cluster.reaper import CHILDREN_MARK_VARIABLE as MARK

REPLACED_S = 180.0
ANSWER_S = 20.0
"""An answer that takes longer is a hang."""


def marked() -> dict[int, str]:
    """Engine processes (children of replicas) and the mark of their replica, by process id."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get(MARK)
            if mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = mark
    return found


def processes_of(served: Served) -> tuple[psutil.Process, list[psutil.Process]]:
    """The process of the one ready replica, and vLLM's below it, once its engine is among them."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        (record,) = [r for r in served.replicas() if r.state == "ready"]
        process = process_of(record)
        below = descendants(process.pid)
        if any("VLLM::EngineCore" in title for _, title in below):
            return process, [each for each, _ in below]
        assert time.monotonic() < deadline, f"no engine below {process}: {below}"
        time.sleep(0.5)


def descendants(pid: int) -> list[tuple[psutil.Process, str]]:
    """Processes below one, each with its title."""
    parents, titles = {}, {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            titles[process] = " ".join(process.cmdline())
            parents[process] = process.ppid()
    found, known = [], {pid}
    while new := [p for p, parent in parents.items() if parent in known and p.pid not in known]:
        known |= {p.pid for p in new}
        found += [(p, titles[p]) for p in new]
    return found


def ask(served: Served) -> httpx.Response:
    """One short request that must be answered in time, whatever the answer is."""
    return httpx.post(
        f"{served.url}/v1/completions", json={"model": "red", "prompt": "the cat", "max_tokens": 2}, timeout=ANSWER_S
    )


def wait_until_replaced(served: Served, old: str) -> set[int]:
    """Ask until another replica answers; the statuses seen. Every 503 must say when to try again."""
    seen = set()
    deadline = time.monotonic() + REPLACED_S
    while time.monotonic() < deadline:
        answer = ask(served)
        seen.add(answer.status_code)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["code"] == "engine_unavailable"
        elif answer.status_code == 200 and all(r.id != old for r in served.replicas()):
            return seen
        time.sleep(0.3)
    raise AssertionError(f"no new replica within {REPLACED_S} s; saw {seen}")


def test_a_killed_engine_process_is_replaced_and_nobody_hangs(served: Served) -> None:
    _, engine = processes_of(served)
    old = served.replicas()[0].id
    (process,) = [p for p in engine if "VLLM::EngineCore" in " ".join(p.cmdline())]
    stream = served.client().completions.create(
        model="tiny", prompt="the cat", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    process.kill()
    started = time.monotonic()
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert time.monotonic() - started < ANSWER_S
    assert wait_until_replaced(served, old) <= {200, 503}
    _, alive = psutil.wait_procs(engine, timeout=20)
    assert not alive


def test_a_killed_replica_leaves_no_engine_process_behind(served: Served) -> None:
    replica, engine = processes_of(served)
    assert any("VLLM::EngineCore" in " ".join(p.cmdline()) for p in engine)
    old = served.replicas()[0].id
    marks = {mark for pid, mark in marked().items() if pid in {p.pid for p in engine}}
    os.kill(replica.pid, signal.SIGKILL)
    assert wait_until_replaced(served, old) <= {200, 503}
    _, alive = psutil.wait_procs(engine, timeout=20)
    assert not alive
    assert not marks & set(marked().values())
