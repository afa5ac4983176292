"""Limits in a model's config."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.config import GatewayConfig, ServedModelConfig
from tandem.errors import ConfigError


@pytest.mark.parametrize("keys", [{"requests_per_replica": 0}, {"max_queued": -1}, {"hold_s": -0.5}], ids=repr)
def test_an_invalid_limit_is_refused_with_its_key(keys: dict[str, Any]) -> None:
    (name,) = keys
    with pytest.raises(ConfigError, match=rf"models\[\]\.{name} is {keys[name]}"):
        ServedModelConfig(model="x", **keys)


def test_client_stall_s_has_a_minimum() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.client_stall_s is 0\.0"):
        GatewayConfig(client_stall_s=0.0)


@pytest.mark.parametrize("key", ["connect_timeout_s", "request_timeout_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_timeout_is_refused_with_its_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"gateway\.{key} is {value}"):
        GatewayConfig(**{key: value})  # type: ignore[arg-type]


def test_max_queued_and_hold_s_may_be_0() -> None:
    assert ServedModelConfig(model="x", max_queued=0, hold_s=0.0, requests_per_replica=1).max_queued == 0
