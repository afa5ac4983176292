"""Batches on the engines that serve: beside vLLM's own offline `LLM.generate`, and beside clients.

    python -m bench.serving.queue [--smoke] [--json FILE] [--check]

Rounds alternate between vLLM's `LLM.generate` on the rows of a file, and the same file as a batch of `/v1/batches` on an app with
one engine of the same settings; each is frozen (SIGSTOP) while the other is measured. Compared is the time from the batch's
creation to its last answer. Then clients send requests to the app, without a batch and beside one, in turns.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import KEYS, drive, freeze, resumed_stack, stack
from bench.serving.batch import peer, write_rows

THROUGHPUT, FIRST_TOKEN = 0.95, 1.5
"""Bars: of vLLM's throughput, at least; of the first token without a batch, 95 of 100, at most."""
CLIENTS, TOKENS, REQUESTS = 4, 64, 64
"""Streams of clients, tokens of an answer, requests of a stream."""
BESIDE_ROWS = 4000
"""Rows of the batch beside clients, so that it does not end before they do."""
POLL_S = 0.2
COLUMNS = ("measured", "alone", "with the queue", "ratio")


def main() -> int:
    """Measure; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of fewer rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.rows = 1, 200
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = report.Rounds(options.json)
    with contextlib.ExitStack() as exit_stack:
        folder = Path(exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp")))
        write_model(folder / "bench")
        (folder / "model").symlink_to("bench")
        write_rows(folder / "rows.jsonl", options.rows)
        measure_peer = exit_stack.enter_context(peer(folder))
        port = exit_stack.enter_context(stack("tandem", folder))
        freeze("tandem", True)
        for number in range(options.rounds):
            figures: dict[str, Any] = {"round": number}
            for turn in ("vllm", "batch") if number % 2 else ("batch", "vllm"):
                if turn == "vllm":
                    figures["vllm"] = measure_peer()
                else:
                    with resumed_stack("tandem", port):
                        figures["batch"] = run_batch(port, folder / "rows.jsonl")
                        figures |= beside_clients(port, folder / "rows.jsonl", queue_first=bool(number % 2))
            if figures["batch"]["tokens"] != figures["vllm"]["tokens"]:
                raise RuntimeError(
                    f"vLLM wrote {figures['vllm']['tokens']} tokens, the batch {figures['batch']['tokens']}."
                )
            results.append(figures)
            print(json.dumps(figures), file=sys.stderr, flush=True)
    rows, verdicts = summarise(results)
    report.show("Batches on the engines that serve, medians", COLUMNS, rows, names=1)
    page_header = "# Batches on the engines that serve\n\nMade by `python -m bench.serving.queue --json ...`."
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(options.json, {"machine": machine(), "rounds": results}, page)
    return report.judge(verdicts, check=options.check)


def client_of(port: int) -> Any:
    """OpenAI's SDK."""
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS[port], timeout=60)


def start_batch(client: Any, rows: Path, copies: int = 1) -> Any:
    """A batch of the rows, each of them `copies` times; its input is uploaded before."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    content = "".join(
        json.dumps({**line, "custom_id": f"{copy}-{number}", "body": {**line["body"], "model": "bench"}}) + "\n"
        for copy in range(copies)
        for number, line in enumerate(lines)
    )
    file = client.files.create(file=("rows.jsonl", content.encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


def run_batch(port: int, rows: Path) -> dict[str, Any]:
    """A whole batch: seconds from its creation to its last answer, and tokens."""
    client = client_of(port)
    batch = start_batch(client, rows)
    began = time.perf_counter()
    answered_s = 0.0
    while batch.status != "completed":
        if batch.status in ("failed", "expired", "cancelled"):
            raise RuntimeError(f"The batch {batch.status}: {batch.errors}")
        counts = batch.request_counts
        if not answered_s and counts.total and counts.completed + counts.failed == counts.total:
            answered_s = time.perf_counter() - began
        time.sleep(POLL_S)
        batch = client.batches.retrieve(batch.id)
    whole_s = time.perf_counter() - began
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    tokens = sum(answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers)
    return {
        "seconds": answered_s or whole_s,
        "whole_s": whole_s,
        "tokens": tokens,
        "failed": batch.request_counts.failed,
    }


def beside_clients(port: int, rows: Path, *, queue_first: bool) -> dict[str, Any]:
    """First tokens of clients without a batch, and beside one that is cancelled afterwards."""

    def alone() -> dict[str, Any]:
        return drive(port, CLIENTS, TOKENS, requests=REQUESTS)

    def beside() -> dict[str, Any]:
        client = client_of(port)
        copies = math.ceil(BESIDE_ROWS / len(rows.read_text().splitlines()))
        batch = start_batch(client, rows, copies)
        while not client.batches.retrieve(batch.id).request_counts.completed:
            time.sleep(POLL_S)
        completed_before = client.batches.retrieve(batch.id).request_counts.completed
        figures = drive(port, CLIENTS, TOKENS, requests=REQUESTS)
        before = client.batches.retrieve(batch.id)
        client.batches.cancel(batch.id)
        if before.status != "in_progress":
            raise RuntimeError(
                f"The batch was {before.status} before the clients had their answers. Give it more rows."
            )
        while client.batches.retrieve(batch.id).status != "cancelled":
            time.sleep(POLL_S)
        completed = before.request_counts.completed - completed_before
        return {**figures, "batch_answers": completed}

    turns = {"alone": alone, "beside": beside}
    return {f"clients_{name}": turns[name]() for name in (("beside", "alone") if queue_first else ("alone", "beside"))}


def summarise(results: list[dict[str, Any]]) -> tuple[list[list[str]], list[Verdict]]:
    """The table's rows, and the bars."""

    def median(key: Any) -> float:
        return statistics.median(key(result) for result in results)

    ratio = median(lambda r: r["vllm"]["seconds"] / r["batch"]["seconds"])
    first = median(lambda r: r["clients_beside"]["first_token_p95_ms"] / r["clients_alone"]["first_token_p95_ms"])
    rows = [
        [
            "tokens/s, LLM.generate and a batch",
            f"{median(lambda r: r['vllm']['tokens'] / r['vllm']['seconds']):,.0f}",
            f"{median(lambda r: r['batch']['tokens'] / r['batch']['seconds']):,.0f}",
            f"{ratio:.2f}",
        ],
        [
            f"first token of {CLIENTS} clients, 95 of 100 within, ms",
            f"{median(lambda r: r['clients_alone']['first_token_p95_ms']):.0f}",
            f"{median(lambda r: r['clients_beside']['first_token_p95_ms']):.0f}",
            f"{first:.2f}",
        ],
        [
            f"tokens/s of {CLIENTS} clients, alone and beside the batch",
            f"{median(lambda r: r['clients_alone']['tokens_per_s']):,.0f}",
            f"{median(lambda r: r['clients_beside']['tokens_per_s']):,.0f}",
            f"{median(lambda r: r['clients_beside']['tokens_per_s'] / r['clients_alone']['tokens_per_s']):.2f}",
        ],
        [
            "requests/s of the batch beside clients",
            "",
            f"{median(lambda r: r['clients_beside']['batch_answers'] / r['clients_beside']['seconds']):.1f}",
            "",
        ],
    ]
    verdicts = [
        Verdict(
            ratio >= THROUGHPUT, ratio / THROUGHPUT, f"{ratio:.2f} of LLM.generate's throughput (bar {THROUGHPUT})"
        ),
        Verdict(
            first <= FIRST_TOKEN,
            FIRST_TOKEN / first,
            f"first token at p95 {first:.2f} of that alone (bar {FIRST_TOKEN})",
        ),
    ]
    failed = sum(r["batch"]["failed"] + bool(r["clients_beside"]["failed"]) for r in results)
    verdicts.append(Verdict(not failed, 0.0 if failed else 1.0, f"{failed} failed requests (bar 0)"))
    return rows, verdicts


if __name__ == "__main__":
    sys.exit(main())
