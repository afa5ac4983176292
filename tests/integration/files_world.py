"""A gateway that takes files, with keys of two tenants, and clients of OpenAI's SDK. Real HTTP, no engines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from gateway_world import World, running

from tandem.auth import KeyStore, Role
from tandem.config import FilesConfig
from tandem.files.store import FileStore
from tandem.registry import Registry


@dataclass
class Files:
    """A gateway with keys: `lab` and `other` are of two tenants, `user` of the first has the role user."""

    world: World
    lab: openai.AsyncOpenAI
    other: openai.AsyncOpenAI
    user: openai.AsyncOpenAI
    store: FileStore
    folder: Path

    def stored(self) -> list[Path]:
        """All stored contents, whole or not."""
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def used_bytes(self, tenant: str = "lab") -> int:
        return self.store.used_bytes(tenant)


@contextlib.asynccontextmanager
async def files_world(tmp_path: Path, **files: Any) -> AsyncIterator[Files]:
    keys = KeyStore.at(Registry(f"sqlite:///{tmp_path}/tandem.db").address)
    config = FilesConfig(location=str(tmp_path / "files"), **files)
    secrets = [
        keys.create(name, tenant=tenant, role=role, by="test").secret
        for name, tenant, role in (
            ("ann", "lab", Role.TRAINER), ("bob", "other", Role.ADMIN), ("eve", "lab", Role.USER),
        )
    ]  # fmt: skip
    async with running(tmp_path, files=config) as world, contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=f"{world.http.base_url}/v1", api_key=secret, max_retries=0)
            )
            for secret in secrets
        ]
        # On a busy machine the gateway may have started before it could read the keys.
        await until_async(lambda: accepted(clients[-1]))
        store = FileStore.at(world.registry.address)
        yield Files(world, *clients, store=store, folder=tmp_path / "files")
        store.close()


async def ids(page: Any) -> list[str]:
    return [file.id async for file in page]


FORM_START = (
    b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\nuser_data\r\n"
    b"--b\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n"
)
FORM_HEADERS = {"content-type": "multipart/form-data; boundary=b"}


def auth(client: openai.AsyncOpenAI) -> dict[str, str]:
    return {"authorization": f"Bearer {client.api_key}"}


def multipart_headers(world: World, headers: dict[str, str]) -> dict[str, str]:
    """The world's client says that its bodies are JSON; forms have a type of their own."""
    world.http.headers.pop("content-type", None)
    return headers


async def post_form(files: Files, parts: list[tuple[str, Any]]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=files.world.http.base_url, timeout=20) as http:
        return await http.post("/v1/files", files=parts, headers=auth(files.lab))


async def accepted(client: openai.AsyncOpenAI) -> bool:
    with contextlib.suppress(openai.AuthenticationError, openai.InternalServerError):
        await client.files.list()
        return True
    return False


async def until_async(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
