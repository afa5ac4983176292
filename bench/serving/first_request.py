"""Latency of the first request of each kind relative to later ones, at an app that has just started.

    python -m bench.serving.first_request [--rounds 3] [--json FILE] [--check] [--warm]

Each round starts a default app (`tandem serve up`, no engine_args) in a new TANDEM_HOME: nothing is compiled yet (`--warm`: one
home for all rounds). As soon as it is ready, requests of each kind follow each other, one at a time. The first of a kind is
compared with the median of its later ones. The figure of a kind is the median of its ratios over the rounds: a request takes some
tens of milliseconds, so that a moment of another process's work doubles one ratio, and seldom those of most rounds. Each request
for JSON has a schema of its own, which the engine has to compile.

`--check` exits 1 if a kind's figure is above the bar.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ENVIRONMENT, MARK, free_port, members

BAR = 1.5
LATER = 6
"""Requests of a kind after its first."""
TEMPLATE = (
    "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
COMPILED = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")
COLUMNS = ("request", "first ms", "later ms", "first / later", "least", "most")
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "import os"}], "max_tokens": 16}

FULL = {"ignore_eos": True}
"""Answers of one length."""


def kinds(number: int) -> dict[str, dict[str, Any]]:
    """Requests by kind; `number` makes a schema unlike those of other numbers."""
    schema = {
        "type": "object",
        "properties": {f"city_{number}": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": [f"city_{number}"],
        "additionalProperties": False,
    }
    function = {"name": f"weather_{number}", "parameters": schema}
    return {
        "greedy": {"temperature": 0, **FULL},
        "temperature": {"temperature": 1, **FULL},
        "top-p": {"top_p": 0.9, **FULL},
        "top-k": {"top_k": 5, **FULL},
        "min-p": {"min_p": 0.1, **FULL},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, **FULL},
        "seed": {"seed": 1, **FULL},
        "logprobs": {"logprobs": True, "top_logprobs": 3, **FULL},
        "n = 4": {"n": 4, **FULL},
        "guided JSON": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        "tools": {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        "stream": {"stream": True, **FULL},
    }


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--warm", action="store_true", help="one home for all rounds: what one compiles, the next finds"
    )
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 1
    rounds = report.Rounds(options.json)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name:
        folder = Path(name)
        write_model(folder / "bench")
        (folder / "bench" / "chat_template.jinja").write_text(TEMPLATE)
        for number in range(options.rounds):
            rounds.append(one_round(folder, folder / f"home-{0 if options.warm else number}"))
            print(json.dumps(rounds[-1]), file=sys.stderr)
    summary = {kind: summarise([result["ms"][kind] for result in rounds]) for kind in kinds(0)}
    ready_s = statistics.median(result["ready_s"] for result in rounds)
    rows = [cells(kind, figures) for kind, figures in summary.items()]
    verdicts = [
        Verdict(figures["ratio"] <= BAR, BAR / figures["ratio"], f"{kind}: {figures['ratio']:.2f} (bar {BAR})")
        for kind, figures in summary.items()
    ]
    title = f"The first request of its kind, {'warm' if options.warm else 'cold'} caches, medians of {options.rounds} rounds"
    report.show(title, COLUMNS, rows)
    print(f"Ready after {ready_s:.1f} s.")
    page_header = "# First requests\n\nMade by `python -m bench.serving.first_request --json ...`. "
    page_header += f"{title}; ready after {ready_s:.1f} s."
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(options.json, {"machine": machine(), "ready_s": ready_s, "summary": summary, "rounds": rounds}, page)
    return report.judge(verdicts, check=options.check)


def one_round(folder: Path, home_folder: Path) -> dict[str, Any]:
    """One app: seconds until it is ready, and the milliseconds of each request, by kind."""
    port = free_port()
    env = {key: value for key, value in {**os.environ, **ENVIRONMENT}.items() if key not in COMPILED}
    # Precompiled headers and other leftovers of PyTorch lie in the temporary folder.
    (home_folder / "tmp").mkdir(parents=True, exist_ok=True)
    env |= {"TANDEM_HOME": str(home_folder), MARK: "first", "TMPDIR": str(home_folder / "tmp")}
    command = [sys.executable, "-m", "tandem", "serve", "up", str(folder / "bench"), "--port", str(port)]
    start_time = time.monotonic()
    log = home_folder.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait(client, start_time, process, log)
            ready_s = time.monotonic() - start_time
            return {"ready_s": ready_s, "ms": {kind: measure(client, kind) for kind in kinds(0)}}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for member in members("first"):
            member.kill()


def wait(client: httpx.Client, start_time: float, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the app reports that it is ready, before its engine has had any request."""
    while time.monotonic() - start_time < 240 and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"The app is not ready. {log.read_text()[-2000:]}")


def measure(client: httpx.Client, kind: str) -> list[float]:
    """Milliseconds of the requests of a kind, the first one first."""
    latencies_ms = []
    for number in range(1 + LATER):
        start_time = time.perf_counter()
        answer = client.post("/v1/chat/completions", json={"model": "bench", **CHAT, **kinds(number)[kind]})
        latencies_ms.append(1000 * (time.perf_counter() - start_time))
        if answer.status_code != 200:
            raise RuntimeError(f"{kind}: {answer.status_code} {answer.text[:500]}")
    return latencies_ms


def summarise(rounds: list[list[float]]) -> dict[str, float]:
    """Medians over the rounds of a kind."""
    ratios = [latencies[0] / statistics.median(latencies[1:]) for latencies in rounds]
    return {
        "first_ms": statistics.median(latencies[0] for latencies in rounds),
        "later_ms": statistics.median(statistics.median(latencies[1:]) for latencies in rounds),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def cells(kind: str, figures: dict[str, float]) -> list[str]:
    """A row of the table."""
    times = [f"{figures[key]:.1f}" for key in ("first_ms", "later_ms")]
    return [kind, *times, *(f"{figures[key]:.2f}" for key in ("ratio", "least", "most"))]


if __name__ == "__main__":
    sys.exit(main())
