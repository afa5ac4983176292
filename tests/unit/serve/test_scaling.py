from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.apps.deploy import deployment_messages, is_rolled_out
from tandem.config import AutoscalingConfig, PrefillConfig, ServedModelConfig
from tandem.routing.records import ServedModel
from tandem.serve import scaling
from tandem.serve.scaling import (
    GATEWAY_WINDOW_S,
    engine_options,
    engine_version,
    gateway_options,
    gateway_view,
    version_of,
)

MODEL = ServedModel(
    id="base@1", name="base", path="/models/base", config=ServedModelConfig(model="base", engine="vllm")
)


def changed(**values: object) -> ServedModel:
    return replace(MODEL, config=replace(MODEL.config, **values))  # type: ignore[arg-type]


def test_the_engine_version_depends_on_engine_settings_and_not_on_the_number_of_replicas() -> None:
    version = engine_version(MODEL, "", "sqlite://")
    assert engine_version(replace(MODEL), "", "sqlite://") == version
    assert engine_version(changed(replicas=3), "", "sqlite://") == version
    assert engine_version(changed(autoscaling=AutoscalingConfig(max_replicas=9)), "", "sqlite://") == version
    assert engine_version(changed(hold_s=99.0, max_queued=3), "", "sqlite://") == version
    others = {
        engine_version(changed(engine_args={"max_num_seqs": 4}), "", "sqlite://"),
        engine_version(replace(MODEL, id="base@2"), "", "sqlite://"),
        engine_version(MODEL, "of another day", "sqlite://"),
        engine_version(MODEL, "", "postgresql://"),
    }
    assert len(others) == 4 and version not in others


def test_the_version_depends_on_the_packages_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = version_of("same")
    assert version_of("same") == before and len(scaling.code_digest()) == 64
    monkeypatch.setattr(scaling, "code_digest", lambda: "of another day")
    assert version_of("same") != before


def test_rolling_changes_start_new_replicas_first_and_let_streams_drain() -> None:
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


def test_the_gateway_view_keeps_only_the_settings_that_gateways_use() -> None:
    whole = changed(
        engine_args={"max_num_seqs": 4, "scheduling_policy": "priority"},
        env={"A": "b"},
        prefill=PrefillConfig(replicas=3, min_bytes=7, engine_args={"max_num_seqs": 2}),
        autoscaling=AutoscalingConfig(min_replicas=0, max_replicas=9),
        hold_s=99.0,
    )
    seen = gateway_view(whole)
    assert seen.config.engine_args == {"scheduling_policy": "priority"} and not seen.config.env
    assert seen.config.prefill == PrefillConfig(min_bytes=7)
    assert seen.scales_to_zero and seen.config.hold_s == 99.0
    assert not gateway_view(changed(autoscaling=AutoscalingConfig(min_replicas=2))).scales_to_zero
    assert gateway_view(changed(engine_args={"max_num_seqs": 4})) == gateway_view(MODEL)


def app(status: str, deployment: str = "HEALTHY", **states: str) -> dict[str, object]:
    """What Serve says of one with two replicas wanted: the states of replicas, by id."""
    replicas = [{"replica_id": key, "state": state} for key, state in states.items()]
    engine = {"status": deployment, "target_num_replicas": 2, "replicas": replicas}
    return {"status": status, "deployments": {"engine": engine, "other": {**engine, "status": "HEALTHY"}}}


def test_a_change_is_rolled_out_while_old_replicas_still_stream() -> None:
    before = app("RUNNING", a="RUNNING", b="RUNNING")
    assert is_rolled_out(before, before)
    # Serve has not looked at it; it has; one is new; both are coming; both are there, and the old ones told to end.
    assert not is_rolled_out(app("DEPLOYING", a="RUNNING", b="RUNNING"), before)
    assert not is_rolled_out(app("DEPLOYING", "UPDATING", a="RUNNING", b="RUNNING"), before)
    assert not is_rolled_out(app("DEPLOYING", "UPDATING", a="RUNNING", c="RUNNING", b="STOPPING"), before)
    going = {"a": "STOPPING", "b": "STOPPING"}
    assert not is_rolled_out(app("DEPLOYING", "UPDATING", c="RUNNING", d="STARTING", **going), before)
    assert is_rolled_out(app("DEPLOYING", "UPDATING", c="RUNNING", d="RUNNING", **going), before)
    fresh = {"status": "NOT_STARTED", "deployments": {}}
    assert not is_rolled_out(fresh, fresh)
    assert not is_rolled_out(app("DEPLOYING", "UPDATING", c="RUNNING"), fresh)
    assert is_rolled_out(app("DEPLOYING", "UPDATING", c="RUNNING", d="RUNNING"), fresh)


SERVE = "Deployment 'engine-a' in application 'tandem' has 1 replicas that have taken more than 30s to "
"""How Serve begins."""


def told(message: str, status: str = "UPDATING") -> set[str]:
    return deployment_messages({"deployments": {"engine-a": {"status": status, "message": message}}})


def test_a_change_without_free_resources_reports_what_it_needs() -> None:
    serve = (
        "be scheduled. This may be due to waiting for the cluster to auto-scale or for a runtime environment to be installed. "
        "Resources required for each replica: {'CPU': 64}, total resources available: {'CPU': 7.8}. Use `ray status` for more."
    )
    (said,) = told(SERVE + serve)
    assert said.startswith(
        "engine-a waits for room on the cluster: each replica needs {'CPU': 64}, and {'CPU': 7.8} are free."
    )
    assert "ray status" not in said


def test_slow_initialisation_is_not_reported() -> None:
    assert told(SERVE + "initialize.\nThis may be caused by a slow __init__ or reconfigure method.") == set()


def test_other_messages_of_serve_are_reported_by_their_first_line() -> None:
    assert told("A replica died.\nTraceback") == {"A replica died."}
    assert told("of before", status="HEALTHY") == told("") == set()
