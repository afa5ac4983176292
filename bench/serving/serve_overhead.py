"""What serving costs around the engine: a bare vLLM server, Tandem, and Ray Serve LLM, side by side on one tiny model.

    python -m bench.serving.serve_overhead [--smoke] [--json FILE] [--check]

All stacks are up at once; the ones that are not being measured are frozen (SIGSTOP), so that an idle cluster takes nothing
from the one that works. Rounds alternate between the stacks, and medians over the rounds are shown.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import NAMES, drive, freeze, stack, thawed

BAR = 0.95
"""Tandem's tokens/s, as a share of bare vLLM's, at each number of streams, streamed and whole."""
RAY_BAR, BAR_STREAMS = 1.5, 16
"""Tandem's tokens/s as a share of Ray Serve LLM's default, streamed, at so many streams."""
MODES = {"streamed": False, "whole": True}
console = Console(width=None if sys.stdout.isatty() else 140)


def main() -> int:
    """Run the comparison; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="16 streams only, 3 short rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--stacks", nargs="+", choices=list(NAMES), default=list(NAMES))
    given = parser.parse_args()
    if given.smoke:
        given.rounds, given.streams = 3, [BAR_STREAMS]
    results = report.Rounds(given.json)
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
    made = "# Serving overhead\n\nMade by `python -m bench.serving.serve_overhead --json ...`."
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
