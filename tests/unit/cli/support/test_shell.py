"""A Ctrl-C ends a command, whatever was running when it came."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.sdk.cluster import CORE_LEVEL, quiet_driver
from tandem.settings import variable

LOSES_ONE = """
import os, signal, time
from tandem.cli.support.shell import friendly_errors
from tandem.sdk.cluster import uninterrupted

class Finalizer:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)  # raised here, and dropped by Python

with friendly_errors():
    Finalizer()
    try:
        print("lost", flush=True)
        time.sleep(30)
    finally:
        time.sleep(1.5)  # the next turn must not break into this
        with uninterrupted():
            time.sleep(1.5)
        print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_python_dropped_comes_again_and_leaves_the_clean_up_alone(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES_ONE.format(name=name)], capture_output=True, text=True, timeout=25
    )
    assert done.stdout.split("\n")[:2] == ["lost", "cleaned up"], done.stdout + done.stderr
    assert done.returncode == 128 + signal.SIGINT
    assert "Exception ignored in" in done.stderr


PRESSED_AGAIN = """
import atexit, os, signal, time

@atexit.register  # the first to be registered is the last to run
def press_again():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)

from tandem.cli.support.shell import friendly_errors

with friendly_errors():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


def test_an_interrupt_while_the_interpreter_ends_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PRESSED_AGAIN], capture_output=True, text=True, timeout=25)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "Interrupted.\n"


THROUGH_C = """
import ctypes
from tandem.cli.support.shell import friendly_errors

run = ctypes.pythonapi.PyRun_String
run.restype, run.argtypes = ctypes.py_object, [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object]
STATEMENTS = 257

with friendly_errors():
    run(b"raise KeyboardInterrupt", STATEMENTS, {}, {})
"""


def test_an_interrupt_within_an_extension_module_leaves_with_the_same_status(tmp_path: Path) -> None:
    (tmp_path / "pressed.py").write_text(THROUGH_C)
    done = subprocess.run([sys.executable, "-m", "pressed"], cwd=tmp_path, capture_output=True, text=True, timeout=25)
    assert done.returncode == 128 + signal.SIGINT, done.stderr


QUIET = """
import logging, sys
from tandem.sdk.cluster import quiet_serve
quiet_serve()
import ray.serve.api, tandem.apps.deploy
sys.exit(logging.getLogger("ray.serve").isEnabledFor(logging.INFO))
"""


def test_informational_messages_of_serve_stay_out_of_the_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_driver_is_quiet_and_what_it_starts_later_is_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CORE_LEVEL, raising=False)
    with pytest.raises(RuntimeError), quiet_driver():
        assert variable(CORE_LEVEL) == "fatal"
        os.write(2, b"from C++\n")
        raise RuntimeError
    assert variable(CORE_LEVEL) is None
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"
    monkeypatch.setenv(CORE_LEVEL, "debug")
    with quiet_driver():
        assert variable(CORE_LEVEL) == "debug"
    assert variable(CORE_LEVEL) == "debug"
