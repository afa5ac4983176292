"""What serving costs around the engine: a bare vLLM server, Tandem, and Ray Serve LLM, side by side on one tiny model.

    python bench/serve_overhead.py [--quick] [--json FILE] [--check]

All stacks are up at once; the ones that are not being measured are frozen (SIGSTOP), so that an idle cluster takes nothing
from the one that works. Rounds alternate between the stacks, and medians over the rounds are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import report
from report import Verdict
from rich.console import Console

HERE = Path(__file__).parent
MARK = "TANDEM_BENCH_STACK"
BAR = 0.95
"""Tandem's tokens/s, as a share of bare vLLM's, at each number of streams, streamed and whole."""
RAY_BAR, BAR_STREAMS = 1.5, 16
"""Tandem's tokens/s as a share of Ray Serve LLM's default, streamed, at so many streams."""
MODES = {"streamed": False, "whole": True}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NAMES = {
    "bare": "vLLM server, bare",
    "bare-one": "the same, one process",
    "tandem": "Tandem",
    "ray": "Ray Serve LLM, default",
    "ray-direct": "Ray Serve LLM, direct streaming",
}
ECHOES = {"echo-1": "Tandem, 1 gateway", "echo-2": "Tandem, 2 gateways"}
"""Stacks of other benchmarks."""
console = Console(width=None if sys.stdout.isatty() else 140)


def main() -> int:
    """Run the comparison; 1 if a bar is missed and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 streams only, 3 short rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--stacks", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--json", type=Path, help="write every round's numbers here")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.streams = 3, [BAR_STREAMS]
    results: list[dict[str, Any]] = []
    # Ended from outside it still has to thaw what it froze: a stopped process cannot see that its owner has gone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp")))
        write_model(folder / "model")
        running: dict[str, int] = {}
        for name in given.stacks:
            with console.status(f"Starting {NAMES[name]}"):
                running[name] = held.enter_context(stack(name, folder))
                freeze(name, True)
        loads = [(streams, mode) for streams in given.streams for mode in given.modes]
        for number in range(-1, given.rounds):
            # Round -1 warms up, and is not counted. The order turns, so that no stack is always the first.
            turned = given.stacks[number % len(given.stacks) :] + given.stacks[: number % len(given.stacks)]
            for name in turned:
                with thawed(name, running[name]):
                    for streams, mode in loads if number >= 0 else [(BAR_STREAMS, "streamed")]:
                        figures = drive(running[name], streams, given.tokens, whole=MODES[mode])
                        if number >= 0:
                            results.append({"stack": name, "round": number, "mode": mode, **figures})
                            said = f"{streams:3} {mode} {figures['tokens_per_s']:8.0f} tokens/s"
                            console.print(f"round {number} {NAMES[name]:32} {said}", style="dim")
    summary = summarise(results, given.stacks, loads)
    rows = [cells(row) for row in summary]
    found = verdicts(summary)
    made = "# Serving overhead\n\nMade by `python bench/serve_overhead.py --json ...`."
    page = f"{made}\n\n{report.lines(COLUMNS, rows)}\n\n{report.ends(found)}\n"
    report.write(given.json, {"machine": machine(), "summary": summary, "rounds": results}, page)
    report.show("Completions, medians (least-most ratio of a round)", COLUMNS, rows, names=3, width=140)
    return report.judge(found, check=given.check)


def summarise(results: list[dict[str, Any]], stacks: list[str], loads: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Medians over the rounds; a ratio is the median of each round's own, since a machine drifts between rounds."""
    rows = []
    for count, mode in loads:
        for name in stacks:
            at = [r for r in results if (r["streams"], r["mode"]) == (count, mode)]
            mine = [r for r in at if r["stack"] == name]
            bare = {r["round"]: r for r in at if r["stack"] == "bare"}
            ratios = [r["tokens_per_s"] / bare[r["round"]]["tokens_per_s"] for r in mine if r["round"] in bare]
            row: dict[str, Any] = {
                "streams": count,
                "mode": mode,
                "stack": name,
                "failed": sum(len(r["failed"]) for r in mine),
            }
            for key in ("tokens_per_s", "first_token_ms", "between_tokens_ms", "generator_cpu", "generator_waited"):
                row[key] = round(statistics.median(r[key] for r in mine), 3)
            row["ratio"] = round(statistics.median(ratios), 3) if ratios else None
            row["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None
            rows.append(row)
    return rows


def verdicts(summary: list[dict[str, Any]]) -> list[Verdict]:
    """Tandem against each bar for which there are figures."""
    found = []
    for row in summary:
        if row["failed"]:
            found.append(Verdict(False, 0.0, f"{NAMES[row['stack']]}: {row['failed']} failed requests"))
        if row["stack"] == "tandem" and row["ratio"] is not None:
            said = f"{row['streams']} {row['mode']}: {row['ratio']:.2f} of bare vLLM (bar {BAR:.2f})"
            found.append(Verdict(row["ratio"] >= BAR, row["ratio"] / BAR, said))
    at = {r["stack"]: r["ratio"] for r in summary if (r["streams"], r["mode"]) == (BAR_STREAMS, "streamed")}
    if at.get("tandem") and at.get("ray"):
        share = at["tandem"] / at["ray"]
        said = f"{BAR_STREAMS} streamed: {share:.2f} of Ray Serve LLM's default (bar {RAY_BAR:.2f})"
        found.append(Verdict(share >= RAY_BAR, share / RAY_BAR, said))
    return found


@contextlib.contextmanager
def stack(name: str, folder: Path) -> Iterator[int]:
    """One stack, up on a port of its own; ends with all its processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    variables = dict(os.environ, **ENVIRONMENT, **{MARK: name, "TANDEM_HOME": str(folder / f"home-{name}")})
    if name == "ray-direct":
        variables |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
        files = {
            "CONFIG_FILE_LOC": "h.cfg",
            "SOCKET_PATH": "h.sock",
            "SERVER_STATE_BASE": "",
            "SERVER_STATE_FILE": "state",
        }
        variables |= {f"RAY_SERVE_HAPROXY_{key}": str(folder / "h" / file) for key, file in files.items()}
        variables |= {
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        }
    log = (folder / f"{name}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "stacks.py"), name, str(folder / "model"), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=variables,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == b"READY":
                break
        else:
            raise RuntimeError(
                f"{(NAMES | ECHOES).get(name, name)} did not start:\n{(folder / f'{name}.log').read_text()[-9000:]}"
            )
        yield port
    finally:
        freeze(name, False)
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        for other in members(name):
            with contextlib.suppress(psutil.Error):
                other.kill()


def members(name: str) -> list[psutil.Process]:
    """Every process of a stack: they inherit its mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def freeze(name: str, stop: bool) -> None:
    """Stop a stack in its tracks, or let it go on."""
    for process in members(name):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)


@contextlib.contextmanager
def thawed(name: str, port: int) -> Iterator[None]:
    """A stack that runs, warm, for the length of a block."""
    freeze(name, False)
    try:
        # Its timers all fire now; it is measured when it answers quickly again.
        for _ in range(20):
            time.sleep(0.5)
            figures = drive(port, 1, 8)
            if not figures["failed"] and figures["seconds"] < 5:
                break
        time.sleep(1.0)
        drive(port, 4, 32)
        yield
    finally:
        freeze(name, True)


def drive(
    port: int, streams: int, tokens: int, *, whole: bool = False, requests: int | None = None, prompt: str = ""
) -> dict[str, Any]:
    """One run of the load generator, in a process of its own; each stream sends `requests`, one after the other."""
    requests = requests or (min(16, max(4, 128 // streams)) if tokens > 32 else 1)
    command = [sys.executable, str(HERE / "load.py"), f"http://127.0.0.1:{port}", "--model", "bench"]
    command += ["--streams", str(streams), "--tokens", str(tokens), "--requests", str(requests)]
    command += ["--whole"] if whole else []
    command += ["--prompt", prompt] if prompt else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout))


def write_model(folder: Path) -> None:
    """A random Llama of 3 million parameters with a BPE of Python's own sources."""
    code = """
import os, sys, sysconfig
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>"], show_progress=False)
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
tokenizer.train([str(f) for f in files], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(sys.argv[1])
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    tie_word_embeddings=True)).save_pretrained(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "load_before": os.getloadavg()[0],
        "when": time.strftime("%Y-%m-%d"),
    }


COLUMNS = (
    "streams",
    "",
    "stack",
    "tokens/s",
    "of bare",
    "first token ms",
    "between tokens ms",
    "generator CPU",
    "waited",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    ratio = (
        "" if row["ratio"] is None else f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f}-{row['ratio_range'][1]:.2f})"
    )
    return [
        str(row["streams"]),
        row["mode"],
        NAMES[row["stack"]],
        f"{row['tokens_per_s']:,.0f}",
        ratio,
        f"{row['first_token_ms']:.1f}",
        f"{row['between_tokens_ms']:.2f}",
        f"{row['generator_cpu']:.0%}",
        f"{row['generator_waited']:.0%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
