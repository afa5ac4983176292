"""What the programs of this folder share: settings of vLLM that are the same on both sides, and requests whose moment counts."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import signal
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.harness.hosts import UnavailableError
from bench.harness.models import write_model
from bench.harness.report import Verdict
from bench.harness.servers import ENVIRONMENT

SKIPPED_STATUS = 77
"""Exit status on a machine that cannot have hosts in namespaces."""
MODEL = "bench"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PROBE_S = 0.1
ANSWER_S = 30.0


def exit_status(measure: Callable[[], int]) -> int:
    """Run a program's measurement; says why, with `SKIPPED_STATUS`, on a machine that cannot have the hosts."""
    # Hosts, Slurm and its jobs are ended when the measurement is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return measure()
    except UnavailableError as error:
        print(f"Nothing is measured: {error}.", file=sys.stderr)
        return SKIPPED_STATUS


def prepare(shared: Path) -> dict[str, str]:
    """Write a model with a chat template and an app's config to a shared folder; returns the variables for vLLM on the nodes."""
    write_model(shared / MODEL)
    (shared / MODEL / "chat_template.jinja").write_text(TEMPLATE)
    served = {"model": str(shared / MODEL), "name": MODEL, "max_adapters": 0, "engine_args": {"max_model_len": 1024}}
    (shared / "app.yaml").write_text(json.dumps({"models": [served]}))
    # Whoever starts first compiles for all.
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")
    return {**ENVIRONMENT, **{name: str(shared / "compiled" / name.lower()) for name in names}}


def ask(base_url: str, key: str, *, tokens: int = 1, timeout_s: float = ANSWER_S) -> str:
    """The text of one answer. OSError or ValueError if there is none."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "import os"}], "max_tokens": tokens}
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def answers_after(base_url: str, key: Callable[[], str], since: float, *, timeout_s: float) -> float:
    """Seconds from `since` (monotonic) to the first answer. `key` returns an empty text for as long as there is none."""
    while time.monotonic() - since < timeout_s:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if found := key():
                ask(base_url, found)
                return time.monotonic() - since
        time.sleep(PROBE_S)
    raise TimeoutError(f"No answer from {base_url} within {timeout_s:g} s.")


def recovers_after(base_url: str, key: str, since: float, *, timeout_s: float) -> float:
    """The same where single requests may hang: each probe is one of many that wait side by side."""
    with concurrent.futures.ThreadPoolExecutor(200) as threads:
        open_probes: list[concurrent.futures.Future[str]] = []
        while time.monotonic() - since < timeout_s:
            open_probes.append(threads.submit(ask, base_url, key, timeout_s=5.0))
            done, _ = concurrent.futures.wait(
                open_probes, timeout=PROBE_S, return_when=concurrent.futures.FIRST_COMPLETED
            )
            if any(probe.exception() is None for probe in done):
                return time.monotonic() - since
            open_probes = [probe for probe in open_probes if probe not in done]
            time.sleep(PROBE_S)
    raise TimeoutError(f"No answer from {base_url} within {timeout_s:g} s.")


def at_most(label: str, value: float, bar: float, unit: str) -> Verdict:
    """A figure that is to be small, against its bar."""
    share = bar / value if value else 1.0
    return Verdict(value <= bar, share, f"{label}: {value:.3g}{unit} (bar {bar:g}{unit})")


def medians(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over rounds."""
    listed = list(rounds)
    return {name: statistics.median(each[name] for each in listed) for name in listed[0]}
