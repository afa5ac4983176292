"""TLS at the public listener: files are checked before anything starts; HAProxy speaks it, and takes renewed files up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from certificates import DAY, NOW, make_pair
from haproxy_listener import curl, listening

from tandem.cluster import tls as tls_module
from tandem.cluster.haproxy import CLIENT_HEADER, SECRET_NAME
from tandem.cluster.tls import check_files, host_of, install, installed
from tandem.config import TlsConfig
from tandem.errors import ConfigError


def test_a_pair_that_fits_is_read_with_its_names(tmp_path: Path) -> None:
    found = check_files(make_pair(tmp_path, "first"))
    assert found.names == ("localhost", "127.0.0.1") and found.not_after > NOW
    assert host_of(found, "127.0.0.1") == "127.0.0.1" and host_of(found, "10.0.0.7") == "localhost"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no certificate", "certificate: .* cannot be read: No such file"),
        ("no key", "key: .* cannot be read: No such file"),
        ("no PEM", "no certificate in PEM"),
        ("no PEM key", "no private key in PEM"),
        ("other key", "is not that of the first certificate"),
        ("passphrase", "has a passphrase"),
        ("expired", "expired at"),
        ("too early", "is valid from"),
        ("readable", "other users can read or change .*mode 0644.*chmod 600"),
        ("group can write", "mode 0660"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path, case: str, said: str) -> None:
    options: dict[str, Any] = {
        "passphrase": {"passphrase": b"secret"},
        "expired": {"days": -1},
        "too early": {"begins": NOW + DAY},
    }.get(case, {})
    pair = make_pair(tmp_path, "first", **options)
    match case:
        case "no certificate":
            Path(pair.certificate).unlink()
        case "no key":
            Path(pair.key).unlink()
        case "no PEM":
            Path(pair.certificate).write_text("certificate")
        case "no PEM key":
            Path(pair.key).write_text("key")
        case "other key":
            Path(pair.key).write_bytes(Path(make_pair(tmp_path, "second").key).read_bytes())
        case "readable":
            Path(pair.key).chmod(0o644)
        case "group can write":
            Path(pair.key).chmod(0o660)
    with pytest.raises(ConfigError, match=said) as error:
        check_files(pair)
    assert "BEGIN" not in str(error.value).replace("-----BEGIN CERTIFICATE-----", "")


def test_a_key_that_a_group_can_read_is_used(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "first")
    Path(pair.key).chmod(0o640)
    assert check_files(pair)


def test_a_path_has_one_line() -> None:
    with pytest.raises(ConfigError, match=r"listen\.tls\.key"):
        TlsConfig(certificate="/a", key="/b\n/c")


@pytest.fixture
async def backend() -> AsyncIterator[int]:
    """A gateway's place: tells headers, and streams until `/end` is asked for."""
    ended = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        number = 0
        while not ended.is_set():
            await answer.write(f"{number}\n".encode())
            number += 1
            await asyncio.sleep(0.05)
        await answer.write(b"last\n")
        return answer

    async def end(request: web.Request) -> web.Response:
        ended.set()
        return web.Response()

    async def headers(request: web.Request) -> web.Response:
        return web.json_response(list(request.headers.items()))

    async def healthy(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/stream", stream)
    app.router.add_get("/end", end)
    app.router.add_get("/headers", headers)
    app.router.add_get("/-/healthz", healthy)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def test_http_2_and_1_1_are_spoken_over_tls_and_nothing_else(tmp_path: Path, backend: int) -> None:
    with listening(tmp_path, backend) as listener:
        install(listener.folder, make_pair(tmp_path, "first"))
        listener.start()
        assert await listener.subject() == "first"
        assert (await curl(listener, "/headers", "--http2"))[1] == "2 200"
        assert (await curl(listener, "/headers", "--http1.1"))[1] == "1.1 200"
        for version, works in (("--tlsv1.3", True), ("--tls-max 1.2", True), ("--tls-max 1.1", False)):
            answer = await curl(listener, "/headers", *version.split(), "--ciphers", "DEFAULT@SECLEVEL=0")
            assert (answer[1] == "2 200") == works, version
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"GET /headers HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
        writer.close()


async def test_haproxy_tells_gateways_its_clients_address_whatever_they_send(tmp_path: Path, backend: int) -> None:
    with listening(tmp_path, backend) as listener:
        install(listener.folder, make_pair(tmp_path, "first"))
        listener.start()
        await listener.subject()
        body, _ = await curl(
            listener, "/headers", "-H", f"{CLIENT_HEADER}: forged 203.0.113.9", "-H", f"{CLIENT_HEADER}: b"
        )
        secret = (listener.folder / SECRET_NAME).read_text()
        assert body.count(CLIENT_HEADER) == 1 and f"{secret} 127.0.0.1" in body and "forged" not in body


@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
async def test_renewed_files_are_taken_up_while_a_stream_goes_on(
    tmp_path: Path, backend: int, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "POLL_S", 1)
    live, second = make_pair(tmp_path, "live"), make_pair(tmp_path, "second")
    with listening(tmp_path, backend) as listener:
        install(listener.folder, live)
        process = listener.start()
        assert await listener.subject() == "live"
        stream = asyncio.create_task(curl(listener, "/stream", version, "-N"))
        await asyncio.sleep(0.5)
        # The certificate first: until the key follows, the pair does not fit and the old one stays in use.
        os.replace(second.certificate, live.certificate)
        await asyncio.sleep(3)
        assert await listener.subject() == "live" and (await curl(listener, "/headers"))[1] == "2 200"
        os.replace(second.key, live.key)
        await listener.until_subject("second")
        assert (await curl(listener, "/headers"))[1] == "2 200" and not stream.done()
        assert process.poll() is None and len(listener.processes) == 1
        await curl(listener, "/end")
        body, told = await stream
        lines = body.split()
        assert lines == [*(str(number) for number in range(len(lines) - 1)), "last"] and told.endswith(" 200")


async def test_a_new_haproxy_has_the_renewed_files_and_goes_on_looking(
    tmp_path: Path, backend: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_module, "POLL_S", 1)
    live, second, third = (make_pair(tmp_path, name) for name in ("live", "second", "third"))
    with listening(tmp_path, backend) as listener:
        install(listener.folder, live)
        listener.start()
        assert await listener.subject() == "live"
        for pair in (second, third):
            for name in ("certificate", "key"):
                os.replace(getattr(pair, name), getattr(live, name))
            listener.reload()
            await listener.until_subject(Path(pair.key).stem)
        fourth = make_pair(tmp_path, "fourth")
        for name in ("certificate", "key"):
            os.replace(getattr(fourth, name), getattr(live, name))
        await listener.until_subject("fourth")
        # A file that is gone for a while changes nothing, for a new HAProxy neither.
        os.unlink(live.key)
        listener.reload()
        await listener.until_subject("fourth")
        # Of a pair that is being looked at there is a copy for a moment, and none is left.
        async with asyncio.timeout(20):
            while list((listener.folder / "tls").glob("candidate*")):
                await asyncio.sleep(0.05)


async def test_without_usable_files_haproxy_does_not_start_in_clear(tmp_path: Path, backend: int) -> None:
    pair, other = make_pair(tmp_path, "first"), make_pair(tmp_path, "second")
    with listening(tmp_path, backend) as listener:
        install(listener.folder, TlsConfig(certificate=pair.certificate, key=other.key))
        assert listener.start().wait(timeout=30) == 1
        assert "cannot be read or do not fit" in listener.log()


async def test_what_is_installed_is_told_and_taken_away(tmp_path: Path, backend: int) -> None:
    pair = make_pair(tmp_path, "first")
    with listening(tmp_path, backend) as listener:
        assert installed(listener.folder) is None
        install(listener.folder, pair)
        assert installed(listener.folder) == pair
        install(listener.folder, None)
        assert installed(listener.folder) is None
        listener.start()
        url = f"http://127.0.0.1:{listener.port}/headers"
        assert (await curl(listener, "/headers", "--retry", "20", "--retry-connrefused", "--url", url))[0].startswith(
            "[["
        )
