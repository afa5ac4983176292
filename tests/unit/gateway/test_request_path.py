"""The modules that a chat completion for an adapter passes are those that docs/adr/0025 lists."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from gateway_world import World, echo, world

__all__ = ["world"]
ADR = Path(__file__).resolve().parents[3] / "docs" / "adr" / "0025-package-structure.md"
ROW = re.compile(r"^\| (\d+) \| `([\w.]+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)
MAX_MODULES = 18
AUTHENTICATION = {
    "gateway.accounting.access_log",
    "gateway.identity.authentication",
    "gateway.identity.client_address",
    "auth.credentials",
    "auth.key_table",
    "auth.keys",
    "auth.principal",
    "serve.listen",
}
"""They stand before the path (docs/adr/0027): they decide whether a request begins."""
BACKGROUND = {
    *("_follow", "refresh", "_cut_stalled_clients", "watch", "_poll", "_repeat", "_answer_all", "_write", "_run"),
    *(
        "_check_files",
        "_remove_ended",
        "_write_all",
        "_expire",
        "_send_all",
        "_report",
        "_exchange_loop",
        "_follow_totals",
    ),
}
"""Functions of tasks that run beside requests; what these call is not part of a request's path."""


def listed() -> tuple[list[str], set[str]]:
    """The path in the ADR, and the modules that stand beside it."""
    rows = ROW.findall(ADR.read_text())
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    return [module for _, module, _ in rows], {name for _, _, uses in rows for name in re.findall(r"`([\w.]+)`", uses)}


def test_the_path_has_at_most_18_modules_and_none_twice() -> None:
    path, beside = listed()
    assert len(path) == len(set(path)) <= MAX_MODULES
    assert not beside & set(path)


async def test_a_request_for_an_adapter_passes_the_listed_modules_only(world: World) -> None:
    world.adapter("red")
    await world.add_engine(echo(), checks=True)
    body = {"model": "red", "messages": [{"role": "user", "content": "one two three " * 100}]}
    assert (await world.http.post("/v1/chat/completions", json=body)).status_code == 200
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = str(frame.f_globals.get("__name__", ""))
        if event != "call" or not name.startswith("tandem.") or name.startswith("tandem.engine.echo"):
            return
        if frame.f_code.co_filename == "<string>":
            return  # a method that `dataclass` has written
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name in BACKGROUND and "asyncio" not in caller.f_code.co_filename:
                return
            caller = caller.f_back
        name = name.removeprefix("tandem.")
        if name not in entered:
            entered.append(name)

    # The engine's thread exists already: its profile function is set by `setprofile_all_threads` from Python 3.12 on only.
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        assert (await world.http.post("/v1/chat/completions", json=body)).status_code == 200
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    path, beside = listed()
    assert set(entered) <= {*path, *beside, *AUTHENTICATION}
    # What runs in this thread, in the order in which it was first entered.
    assert [name for name in entered if name in path] == [name for name in path if name in entered]
    assert {
        "gateway.models.catalog",
        "gateway.relay",
        "gateway.admission.queue",
        "routing.policies",
        "gateway.replicas.upstream",
    } <= set(entered)
