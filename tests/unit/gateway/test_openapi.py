"""Requests made from the OpenAPI document of the admin routes: none is answered with 5xx or against the document."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
import schemathesis
from gateway_world import World, echo, running, world
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from tandem.config import FilesConfig, SchedulingConfig
from tandem.jobs.tracking.capacity import CapacityRecords, content_of

__all__ = ["world"]
ADMIN = {"authorization": "Bearer secret"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
UNDOCUMENTED = {"/openapi.json", "/v1/responses/{response_id}/cancel"}
"""The document itself, and a route that only says that it is not offered."""
FILES = ("/v1/files", "/v1/uploads")
WORK = ("/v1/fine_tuning", "/v1/batches", "/v1/tandem")
STORED = ("/v1/responses/", "/v1/chat/completions/")
EXAMPLES = 20
"""Requests for each operation."""


async def test_the_document_is_served_to_admins(world: World) -> None:
    assert (await world.http.get("/admin/openapi.json")).status_code == 401
    document = (await world.http.get("/admin/openapi.json", headers=ADMIN)).json()
    assert document["openapi"].startswith("3.") and "/adapters" in document["paths"]


async def test_the_whole_document_has_every_route(world: World) -> None:
    document = (await world.http.get("/openapi.json", headers=ADMIN)).json()
    routed = {
        re.sub(r":path", "", str(route.path)) for route in world.app.routes if isinstance(route, Route)
    } - UNDOCUMENTED
    admin = (await world.http.get("/admin/openapi.json", headers=ADMIN)).json()
    assert set(document["paths"]) == routed | {f"/admin{path}" for path in admin["paths"]}
    # Every reference leads somewhere, and schemathesis can make requests of every operation.
    schema = schemathesis.openapi.from_dict(document)
    schema.validate()
    labels = [result.ok().label for result in schema.get_all_operations()]
    assert len(labels) == sum(len(operations) for operations in document["paths"].values())
    names = set(document["components"]["schemas"])
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert referred <= names


@pytest.mark.timeout(300)
async def test_no_request_for_files_is_a_server_error_or_answered_against_the_document(tmp_path: Path) -> None:
    config = FilesConfig(location=str(tmp_path / "files"))
    async with running(tmp_path, files=config) as world:
        document = (await world.http.get("/openapi.json", headers=ADMIN)).json()
        document["paths"] = {path: each for path, each in document["paths"].items() if path.startswith(FILES)}
        asked = await ask_all(document, str(world.http.base_url).rstrip("/"))
        assert len(asked) == 9
        for label in ("POST /v1/files", "GET /v1/files", "POST /v1/uploads"):
            assert 200 in asked[label], asked


@pytest.mark.timeout(300)
async def test_no_request_for_jobs_is_a_server_error_or_answered_against_the_document(tmp_path: Path) -> None:
    async with running(tmp_path, files=FilesConfig(location=str(tmp_path / "files"))) as world:
        document = (await world.http.get("/openapi.json", headers=ADMIN)).json()
        document["paths"] = {path: each for path, each in document["paths"].items() if path.startswith(WORK)}
        with CapacityRecords.at(world.registry.address) as records:
            records.record(content_of([], [], SchedulingConfig()))
        use_ids(document, {"job_id": await fine_tuning_job(world), "batch_id": await batch(world)})
        asked = await ask_all(document, str(world.http.base_url).rstrip("/"))
        assert len(asked) >= 11
        refused = {"POST /v1/fine_tuning/jobs", "POST /v1/batches"}, {"cancel", "pause", "resume", "requeue"}
        for label, statuses in asked.items():
            # Creations name no file that there is; other requests were reached with a job that there is.
            if label not in refused[0] and label.rpartition("/")[2] not in refused[1]:
                assert 200 in statuses, (label, statuses)


async def fine_tuning_job(world: World) -> str:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    body = {"model": "base", "training_file": await upload(world, "fine-tune", row)}
    return await created(world, "/v1/fine_tuning/jobs", body)


async def batch(world: World) -> str:
    row = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"model": "base", "prompt": "a"}}
    body = {"endpoint": "/v1/completions", "completion_window": "24h"}
    return await created(world, "/v1/batches", {**body, "input_file_id": await upload(world, "batch", row)})


async def upload(world: World, purpose: str, row: dict[str, Any]) -> str:
    url = f"{str(world.http.base_url).rstrip('/')}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        made = await client.files.create(file=("rows.jsonl", json.dumps(row).encode() + b"\n"), purpose=purpose)  # type: ignore[arg-type]
        return made.id


async def created(world: World, path: str, body: dict[str, Any]) -> str:
    response = await world.http.post(path, json=body, headers=ADMIN)
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


def use_ids(document: dict[str, Any], ids: dict[str, str]) -> None:
    """Let requests name what there is, and at times what there is not; and leave streams out, which would not end."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["parameters"] = [each for each in operation["parameters"] if each["name"] != "stream"]
            for parameter in operation["parameters"]:
                if parameter["name"] in ids:
                    parameter["schema"] = {"enum": [ids[parameter["name"]], "none"]}


@pytest.mark.timeout(300)
async def test_no_request_for_stored_answers_is_a_server_error_or_answered_against_the_document(world: World) -> None:
    document = (await world.http.get("/openapi.json", headers=ADMIN)).json()
    paths = {path: each for path, each in document["paths"].items() if path.startswith(STORED)}
    paths["/v1/chat/completions"] = {"get": document["paths"]["/v1/chat/completions"]["get"]}
    asked = await ask_all(document | {"paths": paths}, str(world.http.base_url).rstrip("/"))
    assert len(asked) == 8 and 200 in asked["GET /v1/chat/completions"], asked


@pytest.mark.timeout(300)
async def test_no_request_that_the_document_allows_or_forbids_is_a_server_error(world: World) -> None:
    await world.add_engine(echo())
    world.adapter("red")
    document = (await world.http.get("/admin/openapi.json", headers=ADMIN)).json()
    asked = await ask_all(document, f"{str(world.http.base_url).rstrip('/')}/admin")
    assert len(asked) >= 18
    # Most operations were reached with something that they accept.
    assert sum(any(status < 300 for status in statuses) for statuses in asked.values()) >= 6, asked


async def ask_all(document: dict[str, Any], base_url: str) -> dict[str, set[int]]:
    """Send requests of every operation of a document, and check the answers; returns the statuses of each."""
    schema = schemathesis.openapi.from_dict(document)
    asked: dict[str, set[int]] = {}

    def ask(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def answered(case: Any) -> None:
            response = case.call(base_url=base_url, headers=ADMIN)
            asked.setdefault(operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        answered()

    for result in schema.get_all_operations():
        # In a thread: the gateway runs in this loop.
        await asyncio.to_thread(ask, result.ok())
    return asked
