"""Gateway in front of echo engines: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_world import BODY, World, echo
from gateway_world import world as world
from small_folders import small_adapter

from tandem.engine.echo.engine import EchoEngine
from tandem.gateway.app import create_app
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, Snapshot


async def test_a_request_reaches_the_engine_under_its_versioned_name(world: World) -> None:
    await world.add_engine(echo())
    answer = await world.http.post("/v1/completions", json=BODY)
    assert answer.json()["model"] == "base@1" and answer.json()["choices"][0]["text"] == "one two three"
    streamed = await world.http.post("/v1/completions", json=BODY | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")


async def test_an_adapter_registered_now_answers_the_next_request(world: World) -> None:
    await world.add_engine(echo())
    assert (await world.http.post("/v1/completions", json=BODY | {"model": "red"})).status_code == 404
    world.adapter("red")
    assert (await world.http.post("/v1/completions", json=BODY | {"model": "red"})).json()["model"] == "red@1"
    world.adapter("red", rank=4)
    assert (await world.http.post("/v1/completions", json=BODY | {"model": "red"})).json()["model"] == "red@2"
    assert (await world.http.post("/v1/completions", json=BODY | {"model": "red@1"})).json()["model"] == "red@1"
    assert world.engines[0].loads == ["red@1", "red@2"]
    listed = (await world.http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"]) for card in listed] == [("base", "base@1"), ("red", "red@2")]


async def test_an_adapter_request_goes_to_the_replica_that_holds_it(world: World) -> None:
    await world.add_engine(echo())
    await world.add_engine(echo())
    world.adapter("red")
    for _ in range(8):
        assert (await world.http.post("/v1/completions", json=BODY | {"model": "red"})).status_code == 200
    assert sum(len(engine.loads) for engine in world.engines) == 1


async def test_too_large_a_rank_is_refused_with_both_numbers(world: World) -> None:
    await world.add_engine(echo())
    world.adapter("wide", rank=32)
    answer = await world.http.post("/v1/completions", json=BODY | {"model": "wide"})
    assert answer.status_code == 400 and "rank 32" in answer.text and "max_lora_rank 16" in answer.text


async def test_a_dora_adapter_is_refused_with_the_way_to_serve_it(world: World) -> None:
    await world.add_engine(echo())
    world.adapter("lengths", use_dora=True)
    answer = await world.http.post("/v1/completions", json=BODY | {"model": "lengths"})
    assert answer.status_code == 400 and "`tandem models merge lengths@1 NEW_NAME`" in answer.text
    assert "lengths" not in (await world.http.get("/v1/models")).text


async def test_an_unknown_model_is_404_with_the_nearest_name(world: World) -> None:
    answer = await world.http.post("/v1/completions", json=BODY | {"model": "bas"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found" and "'base'" in answer.text
    assert (await world.http.get("/v1/models/bas")).status_code == 404
    assert (await world.http.get("/v1/models/base")).json()["id"] == "base"


async def test_an_invalid_model_name_is_400_without_a_registry_lookup(world: World) -> None:
    world.registry.near = world.registry.resolve = None  # type: ignore[assignment, method-assign]
    for name in ("x" * 257, ["x" * 300], {"x" * 300: 1}, None, 0):
        answer = await world.http.post("/v1/completions", json=BODY | {"model": name})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert len(answer.text) < 250 and "xxx" not in answer.text
    assert (await world.http.get(f"/v1/models/{'x' * 257}")).status_code == 400


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"7", b"\xff", b'{"prompt": "x"}', b'{"model": 3}', b'{"model": ""}', b"[" * 4000]
)
async def test_a_malformed_body_is_400(world: World, body: bytes) -> None:
    answer = await world.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_too_large_a_body_is_413_announced_or_not(world: World) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 1000

    assert (await world.http.post("/v1/completions", content=b" " * 5000)).status_code == 413
    assert (await world.http.post("/v1/completions", content=pieces())).status_code == 413


async def test_without_a_replica_it_is_503_with_retry_after(world: World) -> None:
    answer = await world.http.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert (await world.http.get("/health")).status_code == 503


async def test_an_unreachable_or_dead_replica_is_skipped(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world.records["gone"] = ReplicaRecord(id="gone", pool="base@1", url=f"http://127.0.0.1:{port}", token="x")
    await world.add_engine(echo())
    for _ in range(6):
        assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200
    del world.records["gone"]
    world.engines[0].die()
    answer = await world.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "7"
    await world.add_engine(echo())
    for _ in range(6):
        assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_disconnect_aborts_a_stream_in_the_engine(world: World) -> None:
    engine = echo(delay_s=0.02)
    await world.add_engine(engine)
    long = BODY | {"prompt": "x " * 900, "stream": True}
    async with world.http.stream("POST", "/v1/completions", json=long) as answer:
        async for _ in answer.aiter_raw():
            break
    await gone(engine)


async def test_a_disconnect_aborts_a_plain_request_in_the_engine(world: World) -> None:
    engine = echo(delay_s=0.02)
    await world.add_engine(engine)
    asked = asyncio.create_task(world.http.post("/v1/completions", json=BODY | {"prompt": "x " * 900}))
    async with asyncio.timeout(60):
        while not engine.stats().running:
            await asyncio.sleep(0.01)
    asked.cancel()
    await gone(engine)


async def gone(engine: EchoEngine) -> None:
    for _ in range(200):
        if engine.aborted == 1 and engine.stats().running == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError((engine.aborted, engine.stats()))


async def test_an_engines_error_has_openais_format(world: World) -> None:
    await world.add_engine(echo(max_length=2))
    answer = await world.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error" and "3 tokens" in answer.text


async def test_a_promotion_and_a_roll_back_are_followed_by_the_next_request(world: World) -> None:
    await world.add_engine(echo())
    world.adapter("red")
    world.adapter("red", rank=4, promote=False)
    assert await answered(world, "red") == "red@1" and await answered(world, "red@2") == "red@2"
    world.registry.promote("red@2")
    assert await answered(world, "red") == "red@2"
    world.registry.roll_back("red")
    assert await answered(world, "red") == "red@1"


async def answered(world: World, model: str) -> str:
    answer = await world.http.post("/v1/completions", json=BODY | {"model": model})
    return str(answer.json().get("model") or answer.text)


async def test_a_name_without_a_promoted_version_is_404_with_its_versions(world: World) -> None:
    world.adapter("red", promote=False)
    answer = await world.http.post("/v1/completions", json=BODY | {"model": "red"})
    assert answer.status_code == 404 and "Ask for red@1" in answer.text
    assert [card["id"] for card in (await world.http.get("/v1/models")).json()["data"]] == ["base"]
    card = (await world.http.get("/v1/models/red@1")).json()
    assert (card["id"], card["root"], card["parent"]) == ("red@1", "red@1", "base")


async def test_the_pages_of_the_model_list_contain_every_model_once(world: World) -> None:
    for number in range(5):
        world.adapter(f"a{number}")
    seen, after = [], {}
    while True:
        page = (await world.http.get("/v1/models", params={"limit": 2, **after})).json()
        seen.append([card["id"] for card in page["data"]])
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == [["base", "a0", "a1"], ["a2", "a3"], ["a4"]]
    for wrong in ("0", "1001", "x", "-1", "٣"):
        assert (await world.http.get("/v1/models", params={"limit": wrong})).status_code == 400


ADMIN = {"Authorization": "Bearer secret"}


async def test_admin_routes_open_to_their_own_token_only(world: World) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        for method, path in (
            ("GET", "/admin/adapters"),
            ("DELETE", "/admin/adapters/red"),
            ("GET", "/admin/residency"),
        ):
            answer = await world.http.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert (await world.http.get("/admin/adapters", headers=ADMIN)).json()["data"] == []


async def test_without_an_admin_token_admin_routes_answer_403_with_the_setting(tmp_path: Path) -> None:
    async def watch(version: int) -> Snapshot:
        return Snapshot()

    app = create_app(models=[], watch=watch, registry=Registry(f"sqlite:///{tmp_path}/tandem.db"))
    transport = httpx.ASGITransport(app)
    app.state.identity.keys.loaded = True
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        answer = await http.get("/admin/adapters", headers={"Authorization": "Bearer "})
        assert answer.status_code == 403 and "TANDEM_ADMIN_TOKEN" in answer.text


async def test_an_operator_registers_promotes_rolls_back_pins_and_deletes(world: World) -> None:
    await world.add_engine(echo())

    async def admin(method: str, path: str, **options: object) -> tuple[int, dict[str, Any]]:
        answer = await world.http.request(method, f"/admin/adapters{path}", headers=ADMIN, **options)  # type: ignore[arg-type]
        return answer.status_code, answer.json()

    first, second = (str(small_adapter(world.folder / name, name, rank=8)) for name in ("one", "two"))
    status, made = await admin("POST", "", json={"name": "red", "source": first, "base": "base"})
    assert (status, made["id"], made["base"], made["source"]) == (201, "red@1", "base@1", first)
    status, made = await admin("POST", "", json={"name": "red", "source": second, "base": "base", "promote": False})
    assert (status, made["id"]) == (201, "red@2") and await answered(world, "red") == "red@1"
    assert (await admin("POST", "/red@2/promote"))[1]["id"] == "red@2" and await answered(world, "red") == "red@2"
    assert (await admin("POST", "/red/roll-back"))[1]["id"] == "red@1" and await answered(world, "red") == "red@1"
    assert (await admin("POST", "/red/pin"))[1]["pinned"] is True and world.registry.pins() == ["red"]
    listed = (await admin("GET", "?all=true"))[1]["data"]
    assert [(e["id"], e["promoted"], e["pinned"]) for e in listed] == [("red@1", True, True), ("red@2", False, False)]
    assert (await admin("POST", "/red/unpin"))[1]["was_pinned"] is True and world.registry.pins() == []
    await asyncio.sleep(0.1)
    shown = (await admin("GET", "/red"))[1]
    assert [(p["id"], p["taken_back"]) for p in shown["promotions"]] == [("red@2", True), ("red@1", False)]
    assert shown["replicas"] == ["r0"]
    (replica,) = (await world.http.get("/admin/residency", headers=ADMIN)).json()["data"]
    assert set(replica["in_slots"]) == {"red@1", "red@2"} == set(replica["in_memory"]) == {"red@1", "red@2"}
    assert await admin("DELETE", "/red@1") == (200, {"deleted": ["red@1"]})
    assert await admin("DELETE", "/red") == (200, {"deleted": ["red@2"]})
    assert (await admin("DELETE", "/red"))[0] == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "`name` is missing"),
        ({"name": "red"}, "`source` is missing"),
        ({"name": "red", "source": "/x", "bas": "base"}, "Did you mean 'base'"),
        ({"name": 3, "source": "/x"}, "must be of type str"),
        ({"name": "red", "source": "/no/such", "base": "base"}, "is no folder and no URI"),
        ({"name": "a/b", "source": ".", "base": "base"}, "cannot be used"),
        ({"name": "red", "source": "."}, "does not say which registered model"),
        ({"name": "red", "source": ".", "base": "base"}, "holds no adapter_config.json"),
    ],
)
async def test_a_registration_that_fails_is_400_with_the_reason(
    world: World, body: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(world.folder / "home"))
    answer = await world.http.post("/admin/adapters", json=body, headers=ADMIN)
    assert answer.status_code == 400 and said in answer.text, answer.text
    assert world.registry.list("adapter") == []


async def test_an_adapter_changed_after_registration_is_400_and_others_answer(world: World) -> None:
    await world.add_engine(echo(), checks=True)
    world.adapter("red")
    world.adapter("blue")
    (world.folder / "red-8" / "adapter_model.safetensors").write_bytes(b"cut off")
    assert await answered(world, "blue") == "blue@1"
    answer = await world.http.post("/v1/completions", json=BODY | {"model": "red"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "adapter_refused" and "not a safetensors file" in error["message"]
    small_adapter(world.folder / "red-8", "other", rank=8)
    answer = await world.http.post("/v1/completions", json=BODY | {"model": "red"})
    assert answer.status_code == 400 and "have changed since it was registered" in answer.text
    assert await answered(world, "blue") == "blue@1" and world.engines[0].loads == ["blue@1"]


def test_the_gateway_imports_neither_torch_nor_vllm_nor_transformers_nor_ray() -> None:
    code = (
        "import sys, tandem.gateway.app; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


async def test_no_error_is_longer_than_a_thousand_characters_whatever_the_request_holds(world: World) -> None:
    class Repeating(EchoEngine):
        """Its errors repeat what they got, as vLLM's do for some values."""

        @property
        def app(self) -> Any:
            async def app(scope: Any, receive: Any, send: Any) -> None:
                body = json.dumps({"error": {"message": "x" * 100_000, "param": "p" * 5000}}).encode()
                head = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 400, "headers": head})
                await send({"type": "http.response.body", "body": body})

            return app

    await world.add_engine(Repeating(("base@1", "base")))
    for path, body in (
        ("/v1/completions", BODY),
        ("/v1/completions", BODY | {"stop": {"a": "s" * 3000}}),
        ("/v1/completions", BODY | {"s" * 3000: 1}),
        ("/v1/completions", BODY | {"model": "m" * 3000}),
        ("/v1/messages", BODY | {"messages": [{"role": "user", "content": "c" * 3000}]}),
        ("/v1/completions", {**BODY, "stop": ["s"] * 400}),
    ):
        answer = await world.http.post(path, json=body)
        assert 400 <= answer.status_code < 500 and len(answer.content) < 1500, (path, answer.status_code, answer.text)
        assert "ssss" not in answer.json()["error"]["message"].replace("s" * 40, "") and "cccc" not in answer.text
