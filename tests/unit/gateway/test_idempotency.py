"""Every POST that creates takes an `Idempotency-Key`, or is listed here with the reason why not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_world import World, running

from tandem.config import FilesConfig
from tandem.engine.routes import ENGINE_ROUTES
from tandem.gateway.stored.service import KINDS

ADMIN = {"authorization": "Bearer secret"}
EXCEPTIONS = {
    **{
        route.path: "asks a model and stores nothing: sent again, it is answered again, as at OpenAI"
        for route in ENGINE_ROUTES
        if route.path not in KINDS
    },
    "/v1/uploads/{upload_id}/complete": "makes one file of an upload; sent again with the same parts, it answers the same",
    "/admin/adapters": "the content is the key: what the newest version of the name has makes no other version",
}
CHANGES = re.compile(
    r"/(cancel|pause|resume|requeue|hold|release|pin|unpin|revoke)$|^/v1/chat/completions/\{completion_id\}$"
)
"""Changes of what there is: sent again, they change nothing more."""


async def test_the_document_has_the_header_for_every_post_that_creates(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        document = (await world.http.get("/openapi.json", headers=ADMIN)).json()
    posts = {path: each["post"] for path, each in document["paths"].items() if "post" in each}
    without = {path for path, post in posts.items() if not takes_key(post)}
    assert without == {path for path in posts if path in EXCEPTIONS or CHANGES.search(path)}
    assert set(EXCEPTIONS) <= set(posts)


def takes_key(operation: dict[str, Any]) -> bool:
    return any(each["name"] == "Idempotency-Key" for each in operation.get("parameters", []))


async def upload(world: World, purpose: Any, row: dict[str, Any]) -> str:
    url = f"{str(world.http.base_url).rstrip('/')}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        content = json.dumps(row).encode() + b"\n"
        ids = [
            (await client.files.create(file=("a", content), purpose=purpose, extra_headers={"Idempotency-Key": key})).id
            for key in ("one" + purpose, "one" + purpose, "two" + purpose)
        ]
        assert ids[0] == ids[1] != ids[2]
        return ids[0]


async def test_a_creation_sent_again_with_its_key_makes_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    async with running(tmp_path, files=FilesConfig(location=str(tmp_path / "files"))) as world:

        async def post(path: str, body: Any, key: str) -> tuple[int, Any]:
            answer = await world.http.post(path, json=body, headers=ADMIN | {"idempotency-key": key})
            return answer.status_code, answer.json()

        chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "base", "prompt": "a"}}
        training, requests = await upload(world, "fine-tune", chat), await upload(world, "batch", line)
        batch = {"input_file_id": requests, "endpoint": "/v1/completions", "completion_window": "24h"}
        for path, body in (
            ("/v1/uploads", {"filename": "a", "purpose": "batch", "bytes": 5, "mime_type": "text/plain"}),
            ("/v1/fine_tuning/jobs", {"model": "base", "training_file": training}),
            ("/v1/batches", batch),
        ):
            first, again, other = [await post(path, body, key) for key in ("one", "one", "two")]
            assert first[0] == again[0] == other[0] == 200, (path, first, again, other)
            assert first[1]["id"] == again[1]["id"] != other[1]["id"], path
        # A key's secret is told once: the request sent again names the key, and makes none.
        status, made = await post("/admin/keys", {"name": "ann"}, "one")
        assert status == 201
        for path, body in (("/admin/keys", {"name": "ann"}), (f"/admin/keys/{made['id']}/rotate", {})):
            status, new = (201, made) if path == "/admin/keys" else await post(path, body, "one")
            assert status == 201
            status, refused = await post(path, body, "one")
            assert (status, refused["error"]["code"]) == (409, "idempotency_conflict")
            assert new["id"] in refused["error"]["message"] and new["secret"] not in refused["error"]["message"]
        listed = (await world.http.get("/admin/keys", headers=ADMIN)).json()["data"]
        assert len(listed) == 2
