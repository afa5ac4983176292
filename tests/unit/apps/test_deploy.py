"""What is said of an app that does not start, and whether an app is still as Tandem deployed it."""

from __future__ import annotations

from typing import Any

from tandem.apps.deploy import deployment_messages, deployment_of, is_same_deployment, reason_in

TRACEBACK = """\x1b[36mray::ServeReplica:tandem:engine-m.initialize_and_get_metadata()\x1b[39m (pid=24614, ip=127.0.0.1)
  File "replica.py", line 3521, in initialize_and_get_metadata
    await self._replica_impl.initialize(deployment_config, rank, gang_context)
RuntimeError: Traceback (most recent call last):
  File "vllm.py", line 76, in start
tandem.errors.EngineError: vLLM could not load /m: SafetensorError: incomplete metadata. Its log is /h/logs/engine-m.log."""
REASON = "vLLM could not load /m: SafetensorError: incomplete metadata. Its log is /h/logs/engine-m.log."


def test_the_reason_is_the_replicas_own_error() -> None:
    message = f"The deployment failed to start 3 times in a row. See controller logs for details. Error:\n{TRACEBACK}"
    assert reason_in(message) == REASON


def test_an_error_that_is_not_ours_is_shown_whole() -> None:
    assert reason_in("The deployment failed. Error:\nOSError: no\n") == "The deployment failed. Error:\nOSError: no"


def test_a_failed_attempt_is_told_with_its_reason_and_the_attempts_left() -> None:
    def said(left: str) -> set[str]:
        message = f"A replica failed to start with exception. Retrying{left}. Error:\n{TRACEBACK}"
        return deployment_messages({"deployments": {"engine-m": {"status": "UPDATING", "message": message}}})

    assert said(" 2 more time(s)") == {f"engine-m did not start: {REASON} Attempts left: 2."}
    assert said("") == {f"engine-m did not start: {REASON}"}
    assert said(" 0 more time(s)") == set()


def deployment(at: float = 1.0, source: str = "imperative", controller: str | None = "a") -> dict[str, Any]:
    app = {"last_deployed_time_s": at, "source": source}
    return deployment_of({"applications": {"app": app}, "controller_info": {"worker_id": controller}}, "app")


def test_an_app_is_the_deployed_one_until_it_is_changed() -> None:
    assert is_same_deployment(deployment(), deployment())
    assert not is_same_deployment(deployment(), deployment(at=2.0))
    assert not is_same_deployment(deployment(), deployment_of({}, "app"))


def test_a_controller_that_restarted_has_changed_nothing() -> None:
    assert is_same_deployment(deployment(), deployment(at=2.0, controller="b"))
    assert not is_same_deployment(deployment(), deployment(at=2.0, source="declarative", controller="b"))
    assert not is_same_deployment(deployment(controller=None), deployment(at=2.0, controller="b"))
    # As releases before this one recorded it.
    assert not is_same_deployment({"deployed_at": 1.0}, deployment(at=2.0, controller="b"))
