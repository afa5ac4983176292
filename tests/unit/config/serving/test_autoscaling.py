from __future__ import annotations

import re

import pytest

from tandem.config import AutoscalingConfig, ServeConfig, ServedModelConfig, from_dict
from tandem.errors import ConfigError
from tandem.settings import LONGEST_DRAIN_S


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_replicas": -1}, "min_replicas is -1"),
        ({"min_replicas": 4, "max_replicas": 2}, "max_replicas is 2 and min_replicas 4"),
        ({"min_replicas": 0, "max_replicas": 0}, "max_replicas is 0"),
        ({"max_replicas": 4, "initial_replicas": 5}, "initial_replicas is 5"),
        ({"target_waiting": 0}, "target_waiting is 0"),
        ({"target_kv_usage": 1.5}, "target_kv_usage is 1.5"),
        ({"target_ttft_s": 0.0}, "target_ttft_s is 0.0"),
        ({"downscale_delay_s": -1}, "downscale_delay_s is -1"),
    ],
)
def test_invalid_numbers_are_refused_with_their_key(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        from_dict(AutoscalingConfig, values)


def test_a_number_of_replicas_and_autoscaling_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="replicas is 3, and autoscaling gives 0 to 2"):
        from_dict(ServedModelConfig, {"model": "m", "replicas": 3, "autoscaling": {"min_replicas": 0}})
    with pytest.raises(ConfigError, match="hold_s is 0 and autoscaling.min_replicas too"):
        from_dict(ServedModelConfig, {"model": "m", "hold_s": 0.0, "autoscaling": {"min_replicas": 0}})
    served = from_dict(ServedModelConfig, {"model": "m", "autoscaling": {"min_replicas": 0}})
    assert served.autoscaling == AutoscalingConfig(min_replicas=0)


def test_drain_timeout_s_is_limited_by_haproxys_timeout() -> None:
    with pytest.raises(ConfigError, match="drain_timeout_s"):
        ServeConfig(drain_timeout_s=LONGEST_DRAIN_S + 1)
