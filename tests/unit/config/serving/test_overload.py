"""What a model's limits may be."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.config import GatewayConfig, ServedModelConfig
from tandem.errors import ConfigError


@pytest.mark.parametrize("keys", [{"requests_per_replica": 0}, {"max_queued": -1}, {"hold_s": -0.5}], ids=repr)
def test_a_limit_that_cannot_be_is_refused_by_its_name(keys: dict[str, Any]) -> None:
    (name,) = keys
    with pytest.raises(ConfigError, match=rf"models\[\]\.{name} is {keys[name]}"):
        ServedModelConfig(model="x", **keys)


def test_a_client_may_not_be_cut_off_at_once() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.client_stall_s is 0\.0"):
        GatewayConfig(client_stall_s=0.0)


@pytest.mark.parametrize("key", ["connect_timeout_s", "request_timeout_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_no_connection_can_have_is_refused_by_its_name(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"gateway\.{key} is {value}"):
        GatewayConfig(**{key: value})  # type: ignore[arg-type]


def test_nobody_may_wait_and_nobody_be_held() -> None:
    assert ServedModelConfig(model="x", max_queued=0, hold_s=0.0, requests_per_replica=1).max_queued == 0
