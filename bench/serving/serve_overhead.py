"""Overhead of serving around the engine: bare vLLM servers, Tandem, and Ray Serve LLM, side by side on one tiny model.

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
from bench.harness.servers import NAMES, drive, freeze, resumed_stack, stack

BAR_STREAMS = (8, 16, 32)
"""Numbers of streams that have bars; answers are streamed."""
FIRST_BAR = 1.15
"""Tandem's median time to first token, as a share of that of vLLM's server as it comes."""
TOKENS_BAR = 0.97
"""Tandem's tokens/s, as a share of those of vLLM's server with the executor that Tandem chooses."""
RAY_BAR = 1.5
"""Tandem's tokens/s, as a share of Ray Serve LLM's default."""
MODES = {"streamed": False, "whole": True}
console = Console(width=None if sys.stdout.isatty() else 170)


def main() -> int:
    """Run the comparison; 1 if a bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="8 streams only, 3 short rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--stacks", nargs="+", choices=list(NAMES), default=["bare", "bare-one", "tandem", "ray"])
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.streams = 3, [BAR_STREAMS[0]]
    results = report.Rounds(options.json)
    # Ended from outside it still has to thaw what it froze: a stopped process cannot see that its owner has gone.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as exit_stack:
        folder = Path(exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp")))
        write_model(folder / "model")
        running: dict[str, int] = {}
        for name in options.stacks:
            with console.status(f"Starting {NAMES[name]}"):
                running[name] = exit_stack.enter_context(stack(name, folder))
                freeze(name, True)
        loads = [(streams, mode) for streams in options.streams for mode in options.modes]
        for number in range(-1, options.rounds):
            # Round -1 warms up, and is not counted. The order turns, so that no stack is always the first.
            rotated_stacks = (
                options.stacks[number % len(options.stacks) :] + options.stacks[: number % len(options.stacks)]
            )
            for name in rotated_stacks:
                with resumed_stack(name, running[name]):
                    for streams, mode in loads if number >= 0 else [(BAR_STREAMS[1], "streamed")]:
                        figures = drive(running[name], streams, options.tokens, whole=MODES[mode])
                        if number >= 0:
                            results.append({"stack": name, "round": number, "mode": mode, **figures})
                            line = f"{streams:3} {mode} {figures['tokens_per_s']:8.0f} tokens/s"
                            console.print(f"round {number} {NAMES[name]:32} {line}", style="dim")
    summary = summarise(results, options.stacks, loads)
    rows = [cells(row) for row in summary]
    verdict_list = verdicts(summary)
    page_header = "# Serving overhead\n\nMade by `python -m bench.serving.serve_overhead --json ...`."
    page = f"{page_header}\n\n{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(verdict_list)}\n"
    report.write(options.json, {"machine": machine(), "summary": summary, "rounds": results}, page)
    report.show("Completions, medians (least-most ratio of a round)", COLUMNS, rows, names=3, width=170)
    return report.judge(verdict_list, check=options.check)


def summarise(results: list[dict[str, Any]], stacks: list[str], loads: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Medians over the rounds; a ratio is the median of each round's own, since a machine drifts between rounds."""
    rows = []
    for count, mode in loads:
        at = [r for r in results if (r["streams"], r["mode"]) == (count, mode)]
        for name in stacks:
            stack_rounds = [r for r in at if r["stack"] == name]
            row: dict[str, Any] = {
                "streams": count,
                "mode": mode,
                "stack": name,
                "failed": sum(len(r["failed"]) for r in stack_rounds),
            }
            for key in ("tokens_per_s", "first_token_ms", "between_tokens_ms", "generator_cpu", "generator_waited"):
                row[key] = round(statistics.median(r[key] for r in stack_rounds), 3)
            for peer in stacks:
                for key in ("tokens_per_s", "first_token_ms"):
                    row[f"{key}_of_{peer}"] = ratios(stack_rounds, [r for r in at if r["stack"] == peer], key)
            rows.append(row)
    return rows


def ratios(own_rounds: list[dict[str, Any]], peers: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """A figure as a share of a peer's in the same round: median, least and most."""
    peer_by_round = {r["round"]: r[key] for r in peers}
    values = [r[key] / peer_by_round[r["round"]] for r in own_rounds]
    return round(statistics.median(values), 3), round(min(values), 3), round(max(values), 3)


def verdicts(summary: list[dict[str, Any]]) -> list[Verdict]:
    """Tandem against each bar for which there are figures."""
    results = [
        Verdict(False, 0.0, f"{NAMES[row['stack']]}: {row['failed']} failed requests")
        for row in summary
        if row["failed"]
    ]
    for row in summary:
        if row["stack"] != "tandem" or row["mode"] != "streamed" or row["streams"] not in BAR_STREAMS:
            continue
        for peer, key, label, bar in (
            ("bare", "first_token_ms", "time to first token", FIRST_BAR),
            ("bare-one", "tokens_per_s", "tokens/s", TOKENS_BAR),
            ("ray", "tokens_per_s", "tokens/s", RAY_BAR),
        ):
            if (ratio := row.get(f"{key}_of_{peer}")) is not None:
                margin = bar / ratio[0] if key == "first_token_ms" else ratio[0] / bar
                message = f"{row['streams']} streams: {ratio[0]:.2f} of the {label} of {NAMES[peer]} (bar {bar:.2f})"
                results.append(Verdict(margin >= 1, margin, message))
    return results


COLUMNS = (
    "streams",
    "",
    "stack",
    "tokens/s",
    "of bare",
    "of bare, one process",
    "first token ms",
    "of bare",
    "between tokens ms",
    "generator CPU",
    "waited",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""

    def share(name: str) -> str:
        of = row.get(name)
        return "" if of is None else f"{of[0]:.2f} ({of[1]:.2f}-{of[2]:.2f})"

    return [
        str(row["streams"]),
        row["mode"],
        NAMES[row["stack"]],
        f"{row['tokens_per_s']:,.0f}",
        share("tokens_per_s_of_bare"),
        share("tokens_per_s_of_bare-one"),
        f"{row['first_token_ms']:.1f}",
        share("first_token_ms_of_bare"),
        f"{row['between_tokens_ms']:.2f}",
        f"{row['generator_cpu']:.0%}",
        f"{row['generator_waited']:.0%}",
    ]


if __name__ == "__main__":
    sys.exit(main())
