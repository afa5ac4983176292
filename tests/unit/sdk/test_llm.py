"""Arguments of `tandem.LLM`, checked before anything starts."""

from __future__ import annotations

import pytest

import tandem
from tandem.errors import ConfigError


@pytest.mark.parametrize(("given", "meant"), [("replica", "replicas"), ("gpu_per_replica", "gpus_per_replica")])
def test_a_misspelt_argument_is_refused_with_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"tandem.LLM has no argument '{given}'. Did you mean '{meant}'"):
        tandem.LLM("m", "http://127.0.0.1:9", **{given: 2})  # type: ignore[arg-type]
