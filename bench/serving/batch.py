"""Overhead of a batch run around the engine: `tandem batch run` beside vLLM's own offline `LLM.generate` on the same rows.

    python -m bench.serving.batch [--smoke] [--json FILE] [--check]

Rounds alternate. vLLM's process lives on between its rounds, frozen (SIGSTOP) and with its prefix cache emptied; Tandem's engine
is a new one each time. Compared is the time from the first row to the last one answered, of Tandem on disk: neither's start
counts. Both have vLLM's executor in one process, one thread, and prompts and lengths of answers that differ from row to row.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import ENVIRONMENT

BAR = 0.95
ARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
SHORTEST, LONGEST = 16, 112
"""Tokens of an answer; as many on average as they are apart from 0 and 128."""
COLUMNS = ("rows", "tokens", "vLLM LLM.generate, tokens/s", "tandem batch run, tokens/s", "of vLLM", "files made after")
PEER = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, args = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(folder, distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor", **args)
rows = [json.loads(line)["body"] for line in open(sys.argv[3])]
prompts = [row["prompt"] for row in rows]
sampling = [SamplingParams(temperature=0.0, max_tokens=row["max_tokens"], ignore_eos=True) for row in rows]
llm.generate(prompts[:16], sampling[:16], use_tqdm=False)
print("READY", flush=True)
for line in sys.stdin:
    llm.reset_prefix_cache()
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print("DONE " + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
"""
OURS = """
import dataclasses, json, sys
import tandem
done = tandem.run_batch(sys.argv[1], model=sys.argv[2], output=sys.argv[3], engine_args=json.loads(sys.argv[4]))
print("DONE " + json.dumps(dataclasses.asdict(done)), flush=True)
"""


def main() -> int:
    """Measure; 1 if the bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of fewer rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1536)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.rows = 1, 768
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = report.Rounds(options.json)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name:
        folder = Path(name)
        write_model(folder / "bench")
        write_rows(folder / "rows.jsonl", options.rows)
        with peer(folder) as measure_peer:
            for number in range(options.rounds):
                turns = {"vllm": measure_peer, "tandem": lambda n=number: run_tandem(folder, n)}
                order = ["vllm", "tandem"] if number % 2 == 0 else ["tandem", "vllm"]
                figures = {each: turns[each]() for each in order}
                rounds.append({"round": number, **compare(figures)})
                print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    row, verdict = summarise(rounds, options.rows)
    report.show("A file of prompts, medians (least-most ratio of a round)", COLUMNS, [row], names=0)
    page_header = "# Batch inference\n\nMade by `python -m bench.serving.batch --json ...`."
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, [row])}\n\n{report.verdict_lines([verdict])}\n"
    report.write(options.json, {"machine": machine(), "rounds": rounds}, page)
    return report.judge([verdict], check=options.check)


def compare(figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One round's figures; RuntimeError if the two did not do the same."""
    vllm, tandem = figures["vllm"], figures["tandem"]
    if tandem["failed"] or tandem["tokens"] != vllm["tokens"]:
        raise RuntimeError(
            f"vLLM wrote {vllm['tokens']} tokens; Tandem {tandem['tokens']}, with {tandem['failed']} rows failed."
        )
    return {
        "tokens": vllm["tokens"],
        "vllm_tokens_per_s": vllm["tokens"] / vllm["seconds"],
        "tandem_tokens_per_s": tandem["tokens"] / tandem["answering_s"],
        "ratio": vllm["seconds"] / tandem["answering_s"],
        "files_s": tandem["files_s"],
        "whole_s": tandem["seconds"],
    }


def summarise(rounds: list[dict[str, Any]], rows: int) -> tuple[list[str], Verdict]:
    """The table's row, and the bar."""
    medians = {key: statistics.median(result[key] for result in rounds) for key in rounds[0]}
    ratios = [result["ratio"] for result in rounds]
    ratio = medians["ratio"]
    row = [
        f"{rows:,}",
        f"{medians['tokens']:,.0f}",
        f"{medians['vllm_tokens_per_s']:,.0f}",
        f"{medians['tandem_tokens_per_s']:,.0f}",
        f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
        f"{medians['files_s']:.1f} s",
    ]
    return row, Verdict(ratio >= BAR, ratio / BAR, f"{ratio:.2f} of vLLM's LLM.generate (bar {BAR:.2f})")


@contextlib.contextmanager
def peer(folder: Path) -> Iterator[Any]:
    """vLLM's LLM in a process of its own; yields a function that answers all rows once."""
    command = [sys.executable, "-c", PEER, str(folder / "bench"), json.dumps(ARGS), str(folder / "rows.jsonl")]
    log = (folder / "vllm.log").open("wb")
    # A group of its own, so that the engine's process is frozen with it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=os.environ | ENVIRONMENT,
        text=True,
        process_group=0,
    )

    def wait_for(word: str) -> str:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise RuntimeError((folder / "vllm.log").read_text()[-6000:])

    def measure() -> dict[str, Any]:
        assert process.stdin is not None
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(1.0)
        process.stdin.write("go\n")
        process.stdin.flush()
        figures: dict[str, Any] = json.loads(wait_for("DONE "))
        os.killpg(process.pid, signal.SIGSTOP)
        return figures

    try:
        wait_for("READY")
        os.killpg(process.pid, signal.SIGSTOP)
        yield measure
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_tandem(folder: Path, number: int) -> dict[str, Any]:
    """A whole run of Tandem, from no cluster to two files."""
    output = folder / f"answers-{number}"
    command = [
        sys.executable,
        "-c",
        OURS,
        str(folder / "rows.jsonl"),
        str(folder / "bench"),
        str(output),
        json.dumps(ARGS),
    ]
    environment = os.environ | ENVIRONMENT | {"TANDEM_HOME": str(folder / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    result_lines = [line for line in done.stdout.splitlines() if line.startswith("DONE ")]
    if done.returncode or not result_lines:
        raise RuntimeError(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return dict(json.loads(result_lines[-1].removeprefix("DONE ")))


def write_rows(file: Path, count: int) -> None:
    """Pieces of Python's own sources as prompts, in OpenAI's batch format; the same at each call."""
    content = "\n".join(
        p.read_text(errors="replace") for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    )
    dice = random.Random(0)
    with file.open("w") as out:
        for number in range(count):
            start, size = dice.randrange(len(content) - 1000), dice.randrange(40, 600)
            body = {
                "prompt": content[start : start + size],
                "max_tokens": dice.randrange(SHORTEST, LONGEST),
                "temperature": 0.0,
                "ignore_eos": True,
            }
            row = {"custom_id": f"q{number}", "method": "POST", "url": "/v1/completions", "body": body}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
