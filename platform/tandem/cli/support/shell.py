"""Error display and signal handling that all commands share."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from rich.markup import escape

from tandem.errors import TandemError
from tandem.private import check_home
from tandem.sdk.console import INTERRUPTED, errors
from tandem.settings import settings

AGAIN_S = 1.0
"""How soon an interrupt that was lost is raised again."""


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Show a TandemError as one message and leave with its status; a Ctrl-C leaves with 130 and no traceback.

    Every command starts here, so TANDEM_HOME is created or checked here too.
    """
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if warning := check_home(settings().root):
            errors.print(f"[yellow]Warning[/] {escape(warning)}", soft_wrap=True)
        yield
    except TandemError as error:
        fail(error)
    except KeyboardInterrupt:
        interrupt_taken()
        # What is pressed once more while the interpreter ends would kill it then, and the status be another.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        # Where an interrupt went through an extension module that runs Python code (imports do), `python -m` would end by the
        # signal all the same, whatever was made of it. Running anything in that way takes the note back.
        ctypes.pythonapi.PyRun_SimpleString(b"")
        errors.print("[yellow]Interrupted.[/]")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python must not complain of it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    finally:
        interrupt_taken()
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt_taken() -> None:
    """Say that a KeyboardInterrupt has been seen to; otherwise it is raised again until somebody does."""
    if signal.getsignal(signal.SIGALRM) is _leave_again:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind. Python drops what is raised in a finalizer, and libraries drop more, so it is raised again if it was lost."""
    signal.signal(signal.SIGALRM, _leave_again)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _leave_again(number: int, frame: FrameType | None) -> None:
    # What runs while the first one unwinds is clean-up.
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit):
        raise KeyboardInterrupt


def fail(error: TandemError) -> NoReturn:
    """Print what went wrong, and leave with the error's status."""
    errors.print(f"[bold red]Error[/] {escape(str(error))}", soft_wrap=True)
    raise SystemExit(error.exit_code)
