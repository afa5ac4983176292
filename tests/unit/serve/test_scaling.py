from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.config import AutoscalingConfig, ServedModelConfig
from tandem.serve.records import ServedModel
from tandem.serve.scaling import GATEWAY_WINDOW_S, engine_options, engine_version, gateway_options, version_of

MODEL = ServedModel(id="base@1", name="base", path="/models/base", config=ServedModelConfig(model="base"))


def changed(**values: object) -> ServedModel:
    return replace(MODEL, config=replace(MODEL.config, **values))  # type: ignore[arg-type]


def test_what_a_replica_is_made_from_replaces_it_and_how_many_there_are_does_not() -> None:
    version = engine_version(MODEL, "", "sqlite://")
    assert engine_version(replace(MODEL), "", "sqlite://") == version
    assert engine_version(changed(replicas=3), "", "sqlite://") == version
    assert engine_version(changed(autoscaling=AutoscalingConfig(max_replicas=9)), "", "sqlite://") == version
    others = {
        engine_version(changed(engine_args={"max_num_seqs": 4}), "", "sqlite://"),
        engine_version(replace(MODEL, id="base@2"), "", "sqlite://"),
        engine_version(MODEL, "of another day", "sqlite://"),
        engine_version(MODEL, "", "postgresql://"),
    }
    assert len(others) == 4 and version not in others


def test_another_package_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = version_of("same")
    monkeypatch.setattr("tandem.__version__", "99.0")
    assert version_of("same") != before


def test_new_replicas_come_before_old_ones_go_and_streams_have_their_time() -> None:
    options = engine_options(changed(replicas=2), 600)
    assert options["num_replicas"] == 2 and options["max_surge_percent"] == 100
    assert options["graceful_shutdown_timeout_s"] > 600
    assert engine_options(changed(surge_percent=0), 600)["max_surge_percent"] == 0
    assert gateway_options(2, 600)["graceful_shutdown_timeout_s"] > 600 + GATEWAY_WINDOW_S


def test_serve_leaves_every_decision_to_the_policy() -> None:
    config = AutoscalingConfig(min_replicas=0, max_replicas=4, target_waiting=7, upscale_delay_s=3)
    options = engine_options(changed(autoscaling=config), 600)
    assert "num_replicas" not in options
    told = options["autoscaling_config"]
    assert (told.min_replicas, told.max_replicas, told.initial_replicas) == (0, 4, None)
    assert told.upscale_delay_s == told.downscale_delay_s == 0
    assert told.policy.policy_kwargs["target_waiting"] == 7
    assert not told.policy.is_default_policy_function()
