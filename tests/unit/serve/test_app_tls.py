"""TLS between the processes of an app: who belongs to it is answered, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest

from tandem.engine.echo.engine import EchoEngine
from tandem.gateway.replicas.engine_http import EngineHttpError
from tandem.gateway.replicas.engine_pool import EngineConnections
from tandem.routing.records import TOKEN_HEADER, ReplicaRecord
from tandem.serve import directory as directory_module
from tandem.serve.app_tls import APP_NAME, Authority, Enrollment, Identity, Membership, new_request
from tandem.serve.directory import Directory
from tandem.serve.directory_link import DirectoryClient, DirectoryWatcher, ReplicaReporter
from tandem.serve.directory_protocol import Hello, encode_hello, frame
from tandem.serve.replica import host as host_module
from tandem.serve.replica.host import EngineHost

BODY = b'{"model": "echo", "prompt": "one two three"}'
HEADERS = {"content-type": "application/json"}
REPLICA = ReplicaRecord(id="a", pool="base@1", deployment="engine-a", url="http://a", token="t")


@pytest.fixture
async def directory(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Directory]:
    """A directory that takes its address for one of a network."""
    monkeypatch.setattr(directory_module, "is_loopback", lambda host: False)
    made = Directory(lambda deployment: None, host="127.0.0.1")
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def engine(tls: ssl.SSLContext | None) -> AsyncIterator[EngineHost]:
    host = EngineHost(EchoEngine(), max_adapters=0, tls=tls)
    await host.start()
    try:
        yield host
    finally:
        await host.drain(0)


async def ask(host: EngineHost, connections: EngineConnections) -> tuple[int, bytes]:
    answer = await connections.request(
        "POST", f"{host.url}/v1/completions", {**HEADERS, TOKEN_HEADER: host.token}, BODY, silent_s=5.0
    )
    try:
        await answer.wait_for_head()
        return answer.status, await answer.read()
    finally:
        answer.close()


async def test_replicas_and_gateways_of_an_app_reach_its_directory(directory: Directory) -> None:
    assert (await directory.address()).tls
    replica, gateway = (Membership(directory.enroll) for _ in range(2))
    reporter = ReplicaReporter(DirectoryClient(directory.address, replica.client), lambda: REPLICA)
    await reporter.start(5.0)
    assert reporter.running and reporter._acknowledged.is_set()
    watcher = DirectoryWatcher(DirectoryClient(directory.address, gateway.client))
    update = await watcher(0)
    assert "a" in str(update)
    watcher.close()
    await reporter.leave()


async def test_a_directory_reads_nothing_of_who_has_no_certificate_of_its_app(directory: Directory) -> None:
    address = await directory.address()
    hello = frame(encode_hello(Hello(token=address.token, purpose="watch")))
    stranger = Identity.signed_by(Authority.create())
    without_certificate = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without_certificate.check_hostname, without_certificate.verify_mode = False, ssl.CERT_NONE
    trusting = stranger.client()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    for context in (None, without_certificate, trusting):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(
                address.host, address.port, ssl=context, server_hostname=APP_NAME if context else None
            )
            writer.write(hello)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
    # Nor does a process of the app send its token to a directory that it has no reason to trust.
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.open_connection(address.host, address.port, ssl=stranger.client(), server_hostname=APP_NAME)


async def test_an_engine_answers_the_gateways_of_its_app_only(directory: Directory) -> None:
    tls = await Membership(directory.enroll).server()
    assert tls is not None
    own = EngineConnections(2.0, Membership(directory.enroll).client)
    other = EngineConnections(2.0, Membership(Directory(lambda deployment: None, host="127.0.0.1").enroll).client)
    async with engine(tls) as host:
        assert host.url.startswith("https://")
        status, body = await ask(host, own)
        assert status == 200 and b"one two three" in body
        with pytest.raises(EngineHttpError):
            await ask(host, other)
        # A gateway without a certificate does not fall back to plain HTTP, with which it would send its token.
        with pytest.raises(EngineHttpError, match="this gateway has no certificate"):
            await ask(host, EngineConnections(2.0))
        own.close()
        other.close()


async def test_an_app_on_loopback_or_told_so_speaks_no_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    on_loopback = Directory(lambda deployment: None, host="127.0.0.1")
    monkeypatch.setattr(directory_module, "is_loopback", lambda host: host.startswith("127.0.0.1"))
    turned_off = Directory(lambda deployment: None, host="127.0.0.2", tls=False)
    for directory in (on_loopback, turned_off):
        assert await Membership(directory.enroll).server() is None
        assert not (await directory.address()).tls
        await directory.close()
    async with engine(None) as host:
        # A gateway whose app spoke TLS before reaches replicas that do not.
        connections = EngineConnections(2.0, Membership(on_loopback.enroll).client)
        assert (await ask(host, connections))[0] == 200
        connections.close()


async def test_an_engine_is_not_asked_where_the_directory_gives_no_certificate(directory: Directory) -> None:
    async def unreachable(request: bytes) -> None:
        raise RuntimeError("the directory is being replaced")

    async with engine(await Membership(directory.enroll).server()) as host:
        connections = EngineConnections(2.0, Membership(unreachable).client)  # type: ignore[arg-type]
        with pytest.raises(EngineHttpError, match="no certificate from the directory: the directory is being replaced"):
            await ask(host, connections)


async def test_a_client_that_makes_no_handshake_is_disconnected(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "HANDSHAKE_S", 0.3)
    async with engine(await Membership(directory.enroll).server()) as host:
        address = host.url.removeprefix("https://").split(":")
        reader, writer = await asyncio.open_connection(address[0], int(address[1]))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_new_replica_asks_again_while_the_directory_is_being_replaced(directory: Directory) -> None:
    calls = 0

    async def enroll(request: bytes) -> Enrollment:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise RuntimeError("the actor is dead")
        return await directory.enroll(request)

    assert await Membership(enroll, patience_s=10.0).server() is not None
    calls = 0
    with pytest.raises(RuntimeError, match="the actor is dead"):
        await Membership(enroll).server()


async def test_connections_above_an_engines_limit_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "MAX_CONNECTIONS", 2)
    async with engine(None) as host:
        where = host.url.removeprefix("http://").split(":")
        kept = [await asyncio.open_connection(where[0], int(where[1])) for _ in range(2)]
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection(where[0], int(where[1]))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        for _, open_writer in kept:
            open_writer.close()
        await asyncio.sleep(0.1)
        connections = EngineConnections(2.0)
        assert (await ask(host, connections))[0] == 200
        connections.close()


def test_a_kept_authority_signs_for_the_same_app() -> None:
    authority = Authority.create()
    again = Authority.from_pem(authority.to_pem())
    assert again.certificate == authority.certificate
    assert Identity.signed_by(again).server() and Identity.signed_by(authority).client()


def test_a_request_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="PEM"):
        Authority.create().sign(b"no request")
    key, request = new_request()
    assert b"PRIVATE" in key and b"PRIVATE" not in request
