"""The error of a start that failed is the engine's own, not that another process had one."""

from __future__ import annotations

import pytest

from tandem.engine.vllm.start_errors import explain_start_error, last_error

POINTER = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
PREFIX = "(EngineCore pid=6479) "
CHILD = f"""{PREFIX}Process EngineCore:
{PREFIX}Traceback (most recent call last):
{PREFIX}  File "weight_utils.py", line 963, in safetensors_weights_iterator
{PREFIX}    with safe_open(st_file, framework="pt") as f:
{PREFIX}         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
{PREFIX}safetensors._safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata
"""
WORKER = """(Worker pid=7) ERROR 11-29 19:10:12 [multiproc_executor.py:880] WorkerProc failed to start.
(Worker pid=7) ERROR 11-29 19:10:12 [multiproc_executor.py:880] Traceback (most recent call last):
(Worker pid=7) ERROR 11-29 19:10:12 [multiproc_executor.py:880]   File "worker.py", line 1, in init
(Worker pid=7) ERROR 11-29 19:10:12 [multiproc_executor.py:880] ValueError: No available memory for the cache blocks.
(EngineCore pid=6) ERROR 11-29 19:10:13 [core.py:1] Exception: WorkerProc initialization failed due to an exception in a \
background process. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_a_failed_start_is_told_with_the_child_processs_last_error() -> None:
    assert explain_start_error(f"vLLM could not load /m: {POINTER}", CHILD) == (
        "vLLM could not load /m: SafetensorError: Error while deserializing header: incomplete metadata"
    )


def test_errors_that_point_at_another_process_are_passed_over() -> None:
    assert last_error(WORKER) == "ValueError: No available memory for the cache blocks."


def test_a_message_of_several_lines_is_kept_up_to_the_third() -> None:
    said = "pydantic_core.ValidationError: 1 validation error for X\n  first\n  second\n  third\n"
    assert last_error(said) == "ValidationError: 1 validation error for X first second"


def test_a_process_that_was_killed_is_told_with_its_signal() -> None:
    message = explain_start_error(f"vLLM could not load /m: {POINTER.replace('{}', str({'EngineCore': -9}))}", "")
    assert message.startswith("vLLM could not load /m: the engine's process was killed by signal 9;")


def test_without_an_error_in_the_output_none_is_made_up() -> None:
    assert explain_start_error(f"could not: {POINTER}", "some output\n") == (
        "could not: vLLM's engine process ended without an error message"
    )
    assert explain_start_error("It died of its first requests", "x") == "It died of its first requests"


@pytest.mark.parametrize("message", ["It died of its first requests.", "It died of its first requests"])
def test_another_error_gets_the_engines_last_one_added(message: str) -> None:
    assert explain_start_error(message, "RuntimeError: kernel missing\n") == (
        "It died of its first requests. The engine's last error: RuntimeError: kernel missing"
    )
    assert explain_start_error("failed: kernel missing", "RuntimeError: kernel missing\n") == "failed: kernel missing"
