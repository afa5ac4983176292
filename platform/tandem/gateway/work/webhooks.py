"""Sender of webhooks: records ends of jobs, and posts each to the endpoints of the config until they answer 2xx.

Each gateway does it for all; a delivery is sent by one of them at a time. A receiver may get an event twice, with the same
`webhook-id`, where a gateway died after it had sent it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import aiohttp

from tandem.config.serving.webhooks import EVENTS, WebhookConfig
from tandem.gateway.work.public_addresses import PublicResolver, is_public
from tandem.ids import fingerprint
from tandem.jobs.webhooks.deliveries import Deliveries, Delivery, Subscription
from tandem.jobs.webhooks.events import body_of, signed_headers, signing_key
from tandem.registry.timed_calls import TimedCalls
from tandem.secret_values import referred_value
from tandem.tasks import stop

POLL_S = 2.0
MARGIN = timedelta(minutes=10)
"""Time for which ends of jobs are looked at again: their transactions may have committed late."""
DATABASE_S = 10.0
CONNECT_S, ANSWER_S = 5.0, 15.0
"""Seconds that a receiver may take to accept a connection, and to answer."""
CONCURRENT = 16
FORGET_ROUNDS = 1800
"""Rounds between two removals of old rows."""

log = logging.getLogger(__name__)


class WebhookSender:
    """Sends the events of all endpoints of a config. ConfigError if a secret is not on this node."""

    def __init__(self, deliveries: Deliveries, endpoints: Collection[WebhookConfig]) -> None:
        """`deliveries`: connections of its own."""
        self._deliveries = deliveries
        self._endpoints = {str(fingerprint(each.url)): each for each in endpoints}
        self._keys = {
            name: signing_key(referred_value(each.secret, "gateway.webhooks[].secret"))
            for name, each in self._endpoints.items()
        }
        self._subscriptions = [
            Subscription(endpoint=str(fingerprint(each.url)), events=each.events or EVENTS, tenant=each.tenant)
            for each in endpoints
        ]
        self._calls = TimedCalls(deliveries, "webhooks")
        self._recorded_at: datetime | None = None
        self._rounds = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, if there is any endpoint; needs a running event loop."""
        if self._endpoints:
            self._task = asyncio.create_task(self._send_all())

    async def stop(self) -> None:
        """End; what is being sent is sent again by another gateway."""
        await stop(self._task)
        self._calls.close()

    async def round(self) -> int:
        """Record what has ended, and send what is due; how many events were tried."""
        since = None if self._recorded_at is None else self._recorded_at - MARGIN
        self._recorded_at = await self._calls.run(DATABASE_S, self._deliveries.record, self._subscriptions, since)
        claimed = await self._calls.run(DATABASE_S, self._deliveries.claim, list(self._endpoints), CONCURRENT)
        if claimed:
            await asyncio.gather(*(self._deliver(each) for each in claimed))
        if self._rounds % FORGET_ROUNDS == 0:
            await self._calls.run(DATABASE_S, self._deliveries.forget_old)
        self._rounds += 1
        return len(claimed)

    async def _send_all(self) -> None:
        while True:
            try:
                while await self.round() == CONCURRENT:
                    pass
            except Exception as error:  # noqa: BLE001 - the next round may succeed
                log.warning("Webhooks could not be sent: %s. They are later.", str(error) or type(error).__name__)
            await asyncio.sleep(POLL_S * random.uniform(0.75, 1.25))

    async def _deliver(self, delivery: Delivery) -> None:
        problem = await self._post(delivery)
        if problem is None:
            await self._calls.run(DATABASE_S, self._deliveries.delivered, delivery)
            return
        goes_on = await self._calls.run(DATABASE_S, self._deliveries.failed, delivery, problem)
        host = urlsplit(self._endpoints[delivery.endpoint].url).hostname
        log.warning(
            "The webhook %s of %s was not taken by %s in attempt %d: %s. %s",
            *(delivery.event.id, delivery.event.job, host, delivery.attempts, problem),
            "It is sent again." if goes_on else "It is given up.",
        )

    async def _post(self, delivery: Delivery) -> str | None:
        """Send an event; why it was not taken, None if it was."""
        endpoint = self._endpoints[delivery.endpoint]
        body = body_of(delivery.event)
        headers = signed_headers(self._keys[delivery.endpoint], delivery.event.id, body, int(time.time()))
        resolver = None if endpoint.allow_private else PublicResolver()
        host = urlsplit(endpoint.url).hostname or ""
        # Addresses are not resolved: the resolver does not see them.
        if resolver is not None and _is_address(host) and not is_public(host):
            return "its address is not public (allow_private)"
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(resolver=resolver, force_close=True),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    timeout=aiohttp.ClientTimeout(total=ANSWER_S, connect=CONNECT_S),
                ) as session,
                session.post(endpoint.url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                if 200 <= answer.status < 300:
                    return None
                redirects = "; redirects are not followed" if 300 <= answer.status < 400 else ""
                return f"it answered {answer.status}{redirects}"
        except TimeoutError:
            return f"it did not answer within {ANSWER_S:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdecimal()
