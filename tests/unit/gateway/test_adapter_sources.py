"""Sources of adapters that the admin route takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from overload_world import overload_world

from tandem.config import GatewayConfig
from tandem.gateway.adapter_sources import check_source
from tandem.gateway.errors import ApiError

ALLOWED = ("s3://bucket/adapters", "gs://models/")


def takes(source: str | Path, home: Path, allowed: tuple[str, ...] = ALLOWED) -> bool:
    try:
        check_source(str(source), allowed, home)
    except ApiError as error:
        assert (error.status, error.code, error.param) == (403, "source_not_allowed", "source")
        return False
    return True


def test_jobs_and_folders_of_the_home_are_taken_others_where_listed(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home / "jobs" / "a", other / "a"):
        folder.mkdir(parents=True)
    assert takes("sft-1a2b3c4d", home) and takes(home / "jobs" / "a", home)
    for source in (other / "a", home / ".." / "other" / "a", "/etc", "/no/such", "~/adapters", "."):
        assert not takes(source, home), source
    assert takes(other / "a", home, (str(other),)) and not takes(tmp_path, home, (str(other),))


def test_a_link_out_of_the_home_is_not_followed(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    (home / "link").symlink_to(other)
    assert not takes(home / "link", home)


@pytest.mark.parametrize("source", ["s3://bucket/adapters", "s3://bucket/adapters/a", "gs://models/x/y"])
def test_uris_below_a_listed_one_are_taken(tmp_path: Path, source: str) -> None:
    assert takes(source, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/adapters-of-others/a",
        "s3://bucket/adapters/../secrets",
        "s3://bucket/adapters/%2e%2e/secrets",
        "s3://bucket/adapters/a?versionId=1",
        "s3://other/adapters/a",
        "http://169.254.169.254/latest/meta-data",
        "simplecache::s3://bucket/adapters/a",
        "s3://bucket/adapters/a::http://10.0.0.7/",
        "file:///etc",
        "memory://a",
        "github://a:b@/c",
    ],
)
def test_other_uris_are_refused(tmp_path: Path, source: str) -> None:
    assert not takes(source, tmp_path)


async def test_the_route_refuses_before_anything_is_read(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(adapter_sources=ALLOWED), admin="secret") as world:
        headers = {"Authorization": "Bearer secret"}
        for source in ("http://10.0.0.7/adapter", "/etc"):
            body = {"name": "a", "source": source, "base": "base"}
            answer = await world.http.post("/admin/adapters", json=body, headers=headers)
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "source_not_allowed", answer.text
            assert source not in answer.text
