"""Webhooks sent to real HTTP receivers, and unwrapped by the `openai` SDK."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from tandem.config import WebhookConfig
from tandem.config.load import from_dict
from tandem.config.serving.app import GatewayConfig
from tandem.errors import ConfigError
from tandem.gateway.work.public_addresses import is_public
from tandem.gateway.work.webhooks import WebhookSender
from tandem.jobs.webhooks.deliveries import DELIVERED, PENDING, Deliveries
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import JobSubmission
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef").decode()


@dataclass
class Receiver:
    """An HTTP server that answers with the next of its statuses, at last with 204."""

    statuses: list[int] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append((dict(request.headers), await request.read()))
        status = self.statuses.pop(0) if self.statuses else 204
        return web.Response(status=status, headers={"location": f"{self.url}/elsewhere"} if status == 302 else {})


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield found
    await runner.cleanup()


@dataclass
class Sending:
    store: JobStore
    deliveries: Deliveries
    clock: ManualClock
    new_sender: Callable[..., WebhookSender]

    def end_job(self, job: str, tenant: str = "lab") -> None:
        self.store.submit(JobSubmission(kind=JobKind.BATCH, name="job", id=job, spec={}, tenant=tenant))
        self.store.cancel(job)


@pytest.fixture
async def sending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sending]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    url, clock = f"sqlite:///{tmp_path}/tandem.db", ManualClock(datetime.now(UTC))
    async with contextlib.AsyncExitStack() as stack:
        store = stack.enter_context(JobStore(url, clock=clock))
        deliveries = stack.enter_context(Deliveries(url, clock=clock))

        def new_sender(target: str, **options: Any) -> WebhookSender:
            values = {"secret": "env:HOOK_SECRET", "allow_private": True, **options}
            sender = WebhookSender(deliveries.with_clock(clock), [WebhookConfig(url=target, **values)])
            stack.push_async_callback(sender.stop)
            return sender

        yield Sending(store, deliveries, clock, new_sender)


async def test_an_event_is_sent_until_the_receiver_takes_it_and_unwrapped_by_the_sdk(
    sending: Sending, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302]
    sender = sending.new_sender(receiver.url)
    sending.end_job("batch_1")
    for _ in range(3):
        assert await sender.round() == 1
        assert await sender.round() == 0, "it waits before the next attempt"
        sending.clock.advance(30.0)
    assert set(sending.deliveries.states().values()) == {DELIVERED} and len(receiver.requests) == 3
    client = openai.OpenAI(api_key="x", webhook_secret=SECRET)
    events = [client.webhooks.unwrap(body, headers) for headers, body in receiver.requests]
    assert {(event.type, event.data.id, event.object) for event in events} == {("batch.cancelled", "batch_1", "event")}  # type: ignore[union-attr]
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    headers, body = receiver.requests[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"batch_1", b"batch_2"), headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret="another")


async def test_an_event_whose_sender_died_is_sent_by_the_next_one(sending: Sending, receiver: Receiver) -> None:
    sending.end_job("batch_1")
    first = sending.new_sender(receiver.url)
    first._deliveries.record(first._subscriptions)
    assert len(first._deliveries.claim(list(first._endpoints), 10)) == 1
    second = sending.new_sender(receiver.url)
    assert await second.round() == 0
    sending.clock.advance(61.0)
    assert await second.round() == 1 and len(receiver.requests) == 1


async def test_a_receiver_at_a_private_address_is_not_asked_unless_allowed(
    sending: Sending, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    sending.end_job("batch_1")
    port = receiver.url.rsplit(":", 1)[1]
    for host in ("localhost", "127.0.0.1", "[::1]"):
        sender = sending.new_sender(f"https://{host}:{port}", allow_private=False)
        assert await sender.round() == 1
    assert receiver.requests == [] and set(sending.deliveries.states().values()) == {PENDING}
    assert caplog.text.count("not public") == 3 and SECRET not in caplog.text


async def test_a_receiver_that_is_not_there_is_tried_later(sending: Sending) -> None:
    sending.end_job("batch_1")
    sender = sending.new_sender("http://127.0.0.1:9")
    assert await sender.round() == 1
    assert set(sending.deliveries.states().values()) == {PENDING}


async def test_an_endpoint_of_a_tenant_is_told_of_its_own_jobs_alone(sending: Sending, receiver: Receiver) -> None:
    for tenant in ("lab", "other"):
        sending.end_job(f"batch_{tenant}", tenant)
    sender = sending.new_sender(receiver.url, tenant="lab", events=("batch.cancelled",))
    assert await sender.round() == 1 and b"batch_lab" in receiver.requests[0][1]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("::1", False), ("fe80::1%eth0", False), ("fd00::1", False),
        ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:a00:1::1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("localhost", False),
    ],
)  # fmt: skip
def test_addresses_inside_a_network_are_not_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"url": "http://example.com", "secret": "env:S"}, "allow_private"),
        ({"url": "https://example.com", "secret": "whsec_abc"}, "does not stand in a config"),
        ({"url": "https://example.com", "secret": "env:S", "events": ["batch.done"]}, "batch.done"),
        ({"url": "https://u:p@example.com", "secret": "env:S"}, "without user"),
    ],
)
def test_an_endpoint_that_cannot_be_is_refused_with_the_reason(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(GatewayConfig, {"webhooks": [entry]})


def test_a_secret_that_is_not_on_the_node_is_named(tmp_path: Path) -> None:
    with (
        Deliveries(f"sqlite:///{tmp_path}/tandem.db") as deliveries,
        pytest.raises(ConfigError, match="NO_SUCH_SECRET"),
    ):
        WebhookSender(deliveries, [WebhookConfig(url="https://example.com", secret="env:NO_SUCH_SECRET")])
