"""Search for the error that ended an engine's start, in the output of the engine's processes. Pure.

vLLM loads the model in child processes. The parent learns only that one of them ended: "Engine core initialization failed. See
root cause above." The exception itself is in the children's output, a traceback whose lines carry the process's name.
"""

from __future__ import annotations

import re

LINE_PREFIX = re.compile(
    r"^(?:\x1b\[[\d;]*m)*(?:\([^()\s]+(?: pid=\d+)?\)\s?)?(?:\x1b\[[\d;]*m)*"
    r"(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\] ?)?"
)
"""`(EngineCore pid=12) ERROR 11-29 19:10:12 [core.py:1131] `, each part optional."""
EXCEPTION = re.compile(
    r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Failure|Timeout)): (?P<text>.*\S.*)$"
)
"""The last line of a traceback."""
POINTERS = re.compile(
    r"See (?:the )?(?:root cause|stack trace|error)|Engine core initialization failed|WorkerProc initialization failed"
)
"""Messages that only point at another process's error."""
ENDED_CHILDREN = re.compile(
    r"Engine core initialization failed\. See root cause above\. Failed core proc\(s\): (\{.*?\})"
)
KILLED = re.compile(r":\s*-(\d+)")
TANDEM_ERRORS = "tandem.errors."
MAX_LINES = 3
"""Lines of one message that are kept: pydantic's have one for each field."""
MAX_CHARS = 1000
NO_OUTPUT = "vLLM's engine process ended without an error message"


def last_error(output: str) -> str | None:
    """The last exception in the output that does not only point at another, as `ValueError: too long`; None: there is none."""
    lines = [LINE_PREFIX.sub("", line).rstrip() for line in output.splitlines()]
    last: str | None = None
    for number, line in enumerate(lines):
        match = EXCEPTION.match(line)
        if match is None or POINTERS.search(line) or match["type"].startswith(TANDEM_ERRORS):
            continue
        message_lines = [f"{match['type'].rpartition('.')[2]}: {match['text']}"]
        for next_line in lines[number + 1 : number + MAX_LINES]:
            # Only indented lines belong to a message: the next traceback or log line does not.
            if not next_line.startswith("  ") or next_line.lstrip().startswith(("File ", "For further information")):
                break
            message_lines.append(next_line.strip())
        last = " ".join(message_lines)
    if last is None or len(last) <= MAX_CHARS:
        return last
    return f"{last[:MAX_CHARS]} ..."


def explain_start_error(message: str, output: str) -> str:
    """The message of a failed start, with the engine's own last error where it only points at it, or lacks it."""
    cause = last_error(output)
    pointer = ENDED_CHILDREN.search(message)
    if pointer is None:
        if cause is None or cause.partition(": ")[2] in message:
            return message
        return f"{message.rstrip('. ')}. The engine's last error: {cause}"
    killed = KILLED.search(pointer[1])
    if cause is None and killed:
        cause = f"the engine's process was killed by signal {killed[1]}"
        if killed[1] == "9":
            cause += "; the kernel does that when memory runs out"
    return message[: pointer.start()] + (cause or NO_OUTPUT) + message[pointer.end() :]
