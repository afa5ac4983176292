"""`tandem serve up` with TLS: HTTP/2 from a client's side, addresses of clients in the audit log, renewal during a stream."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from certificates import make_pair
from commands import tandem

from tandem.cluster.ports import free_ports
from tandem.config import TlsConfig


def trusting(certificate: str) -> ssl.SSLContext:
    """For a client that trusts a certificate that signs itself."""
    return ssl.create_default_context(cafile=certificate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def pair(folder: Path) -> TlsConfig:
    return make_pair(folder, "live")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tls-home")
    home.chmod(0o700)
    return home


@pytest.fixture(scope="module")
def key(home: Path) -> str:
    done = tandem("keys", "create", "first", "--role", "admin", "--json", home=home)
    assert done.returncode == 0, done.stdout
    return str(json.loads(done.stdout)["secret"])


@pytest.fixture(scope="module")
def url(home: Path, folder: Path, pair: TlsConfig, key: str) -> Iterator[str]:
    config = folder / "app.yaml"
    config.write_text(
        "models: [{model: echo, name: echo, engine: echo, cpus_per_replica: 0.1, max_adapters: 0, engine_args: {delay_s: 0.1}}]\n"
    )
    (port,) = free_ports(1)
    done = tandem(
        "serve", "up", "--config", str(config), "--host", "0.0.0.0", "--port", str(port), "--detach",
        "--tls-certificate", pair.certificate, "--tls-key", pair.key, home=home,
    )  # fmt: skip
    try:
        assert done.returncode == 0, done.stdout
        assert f"https://127.0.0.1:{port}/v1" in done.stdout
        yield f"https://127.0.0.1:{port}/v1"
    finally:
        tandem("serve", "down", home=home)


def test_clients_reach_the_app_by_https_alone(url: str, key: str, pair: TlsConfig, home: Path) -> None:
    with httpx.Client(verify=trusting(pair.certificate)) as http:
        client = openai.OpenAI(base_url=url, api_key=key, http_client=http)
        assert [model.id for model in client.models.list()] == ["echo"]
    done = subprocess.run(
        ["curl", "-sS", "--cacert", pair.certificate, "--http2", "-o", "/dev/null", "-w", "%{http_version} %{http_code}",
         "-H", f"x-api-key: {key}", f"{url}/models"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "2 200"
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url.replace('https', 'http')}/models")
    assert url in tandem("serve", "status", home=home).stdout


def test_the_audit_log_has_the_address_of_the_client_and_not_what_it_says(
    url: str, key: str, pair: TlsConfig, home: Path
) -> None:
    headers = {"x-api-key": "tdm-wrong", "x-forwarded-for": "203.0.113.9", "x-tandem-client": "guess 203.0.113.9"}
    with httpx.Client(verify=trusting(pair.certificate), base_url=url) as http:
        assert http.get("/models", headers=headers).status_code == 401
        deadline = time.monotonic() + 20
        while True:
            done = tandem("audit", "--action", "credentials", "--json", home=home)
            entries = [e for e in json.loads(done.stdout) if e["after"].get("hint") == "tdm-wron"]
            if entries:
                break
            assert time.monotonic() < deadline
            time.sleep(0.5)
    assert {entry["address"] for entry in entries} == {"127.0.0.1"}
    made = httpx.post(
        f"{url.removesuffix('/v1')}/admin/keys",
        json={"name": "second"},
        headers={"x-api-key": key},
        verify=trusting(pair.certificate),
    )
    assert made.status_code == 201
    (entry,) = [e for e in json.loads(tandem("audit", "--json", home=home).stdout) if e["target"] == made.json()["id"]]
    assert entry["by"].startswith("key_") and entry["address"] == "127.0.0.1"


def test_a_renewed_certificate_is_served_while_a_stream_goes_on(
    url: str, key: str, pair: TlsConfig, folder: Path
) -> None:
    old = folder / "old.crt"
    old.write_bytes(Path(pair.certificate).read_bytes())
    body = {"model": "echo", "prompt": "word " * 150, "max_tokens": 150, "stream": True}
    with httpx.Client(verify=trusting(str(old)), base_url=url, timeout=120, headers={"x-api-key": key}) as http:
        with http.stream("POST", "/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)
            renewed = make_pair(folder, "renewed")
            os.replace(renewed.certificate, pair.certificate)
            os.replace(renewed.key, pair.key)
            deadline = time.monotonic() + 12
            while True:
                try:
                    httpx.get(
                        f"{url}/models", headers={"x-api-key": key}, verify=trusting(pair.certificate)
                    ).raise_for_status()
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            rest = list(lines)
    assert "data: [DONE]" in rest
