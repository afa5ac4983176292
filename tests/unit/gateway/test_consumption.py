"""`/v1/tandem/usage` and `/v1/tandem/capacity` over HTTP, by tenants, clients and the command line."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from jobs_world import JobsWorld, jobs_world

import tandem
from tandem.config import SchedulingConfig
from tandem.errors import ClusterError
from tandem.jobs.dispatch.decisions import NodeAmounts
from tandem.jobs.scheduling import Resources
from tandem.jobs.tracking.capacity import CapacityRecords, content_of
from tandem.sdk.jobs import requests
from tandem.usage import UsageCounts, UsageKey, UsageLabels, UsageStore


@pytest.fixture
async def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JobsWorld]:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    async with jobs_world(tmp_path) as found:
        now = time.time()
        batch = {
            UsageKey.at(UsageLabels(f"key_{n}", tenant, "base@1", "", "/v1/completions"), now): UsageCounts(n, 10, 1)
            for n, tenant in ((1, "lab"), (2, "lab"), (3, "other"))
        }
        with UsageStore.at(found.world.registry.address) as usage:
            usage.add("writer", 1, batch)
        yield found


def record(jobs: JobsWorld) -> None:
    nodes = [NodeAmounts(id="a", total=Resources(8, 4), free=Resources(6, 3))]
    with CapacityRecords.at(jobs.world.registry.address) as records:
        records.record(content_of(nodes, [], SchedulingConfig()))


async def test_a_key_sees_the_usage_of_its_tenant_and_an_admins_that_of_all_in_pages(jobs: JobsWorld) -> None:
    path = "/v1/tandem/usage"
    async with jobs.http("user") as http:
        own = (await http.get(path)).json()
        assert [(row["key_id"], row["requests"]) for row in own["data"]] == [("key_1", 1), ("key_2", 2)]
        assert set(own["data"][0]) >= {"hour", "model", "prompt_tokens"} and not own["has_more"]
        # The filter by tenant is the admins'.
        assert (await http.get(f"{path}?tenant=other&by=tenant")).json()["data"][0]["tenant"] == "lab"
        first = (await http.get(f"{path}?by=key_id&limit=1")).json()
        second = (await http.get(f"{path}?by=key_id&limit=1&offset=1")).json()
        assert first["has_more"] and not second["has_more"] and second["data"][0]["key_id"] == "key_2"
        for query in ("by=modle", "since=yesterday", "limit=0", "until=0001-01-01T00:00%2b14:00", f"by={'a' * 101}"):
            assert (await http.get(f"{path}?{query}")).status_code == 400, query
    async with jobs.http("admin") as http:
        by_tenant = (await http.get(f"{path}?by=tenant")).json()
        assert [row["requests"] for row in by_tenant["data"]] == [3, 3]
        # The two lists are sums of the same rows.
        admin = await http.get("/admin/usage?by=tenant")
        assert admin.json() == by_tenant
        assert len((await http.get(f"{path}?by=tenant&tenant=other")).json()["data"]) == 1


async def test_capacity_has_its_age_and_the_callers_share(jobs: JobsWorld) -> None:
    async with jobs.http("user") as http:
        unknown = await http.get("/v1/tandem/capacity")
        assert unknown.status_code == 503 and unknown.headers["retry-after"]
        record(jobs)
        found = (await http.get("/v1/tandem/capacity")).json()
        assert (found["total"], found["free"]) == ({"cpus": 8, "gpus": 4}, {"cpus": 6, "gpus": 3})
        assert 0 <= found["age_s"] < 60 and [each["tenant"] for each in found["tenants"]] == ["lab"]
    async with jobs.http("admin") as http:
        assert (await http.get("/v1/tandem/capacity")).json()["tenants"] == []
        shop = (await http.get("/v1/tandem/capacity?tenant=shop")).json()["tenants"]
        assert [each["quota"]["gpus"] for each in shop] == [4]


async def test_clients_and_commands_show_both(jobs: JobsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "USAGE_PAGE", 1)
    key = jobs.keys["user"]

    def use() -> None:
        with tandem.Client(jobs.url, api_key=key) as client:
            with pytest.raises(ClusterError, match="not known"):
                client.capacity()
            record(jobs)
            assert client.capacity().free.gpus == 3
            assert [row["key_id"] for row in client.usage(["key_id"])] == ["key_1", "key_2"]

    async def command(*arguments: str) -> str:
        options = ("--api-url", jobs.url, "--api-key", key)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tandem", *arguments, *options, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output
        return output.decode()

    await asyncio.to_thread(use)
    async with tandem.AsyncClient(jobs.url, api_key=key) as client:
        assert (await client.capacity()).total.cpus == 8
        assert [row["requests"] async for row in client.usage(["key_id"])] == [1, 2]
    rows = json.loads(await command("usage", "--by", "tenant", "--json"))
    assert [(row["tenant"], row["requests"]) for row in rows] == [("lab", 3)]
    shown = await command("jobs", "capacity")
    assert "free" in shown and "lab" in shown and "s ago" in shown
