"""From `tandem cluster up` to the first chat answer, over two hosts that are there already.

    python -m bench.cluster.ray_up [--rounds 3] [--json FILE] [--check] [--smoke]

Two hosts in network namespaces, reached by ssh as machines on premises are, with the environment installed and the model's files
on a shared file system. A round runs what a user does: `tandem cluster up`, which starts Ray's head and the worker, `tandem db
upgrade`, a key, `tandem serve up`; it ends with a chat answer on the head, and `tandem cluster down`. A first round, which finds
nothing compiled, is told apart (not with --smoke).

`--check` exits 1 if the median is above 90 s.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

from bench.cluster.common import MODEL, at_most, exit_status, medians, prepare
from bench.harness import report
from bench.harness.machine import machine
from bench.harness.options import options_parser
from bench.harness.ray_up import Deployment, deployment

BAR_S = 90.0
PORT = 8000
PHASES = {
    "cluster": "tandem cluster up",
    "key": "database and key",
    "serve": "tandem serve up",
    "answer": "chat answer",
}
COLUMNS = ("phase", "seconds", "least", "most")


def main() -> int:
    """Measure; 1 if the bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds = 1
    rounds = report.Rounds(arguments.json)
    with tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp") as name, deployment(Path(name)) as found:
        variables = prepare(found.shared)
        with (found.file.parent / "tandem.env").open("a") as environment:
            environment.write("".join(f"\n{name}={shlex.quote(value)}" for name, value in variables.items()) + "\n")
        cold = None if arguments.smoke else one_round(found, "cold")
        for number in range(arguments.rounds):
            rounds.append(one_round(found, f"bench{number}"))
            print(json.dumps(rounds[-1]), file=sys.stderr)
    total = [sum(each.values()) for each in rounds]
    figures = medians({**each, "all": whole} for each, whole in zip(rounds, total, strict=True))
    rows = [row(label, figures[name], [each[name] for each in rounds]) for name, label in PHASES.items()]
    rows.append(row("all", figures["all"], total))
    verdicts = [at_most("`ray up` to the first chat answer", figures["all"], BAR_S, " s")]
    report.show("From `tandem cluster up` to a chat answer, medians", COLUMNS, rows)
    message = "" if cold is None else f"A first round, which finds nothing compiled, takes {sum(cold.values()):.1f} s."
    print(message)
    page = "# ray up to the first chat answer\n\nMade by `python -m bench.cluster.ray_up --json ...`.\n\n"
    page += f"{report.markdown_table(COLUMNS, rows)}\n\n{message}\n\n{report.verdict_lines(verdicts)}\n"
    report.write(arguments.json, {"machine": machine(), "cold": cold, "medians": figures, "rounds": list(rounds)}, page)
    return report.judge(verdicts, check=arguments.check)


def row(label: str, median: float, seconds: list[float]) -> list[str]:
    """A row of the table."""
    return [label, *(f"{value:.1f}" for value in (median, min(seconds), max(seconds)))]


def one_round(found: Deployment, key_name: str) -> dict[str, float]:
    """The seconds of each phase; the cluster is down afterwards."""
    marks = [time.monotonic()]
    found.cluster("up")
    try:
        marks.append(time.monotonic())
        found.head.run("tandem db upgrade")
        key = json.loads(found.head.run(f"tandem keys create {key_name} --json").stdout)["secret"]
        marks.append(time.monotonic())
        found.head.run(f"tandem serve up -c {found.shared}/app.yaml --detach", timeout_s=240)
        marks.append(time.monotonic())
        body = {"model": MODEL, "messages": [{"role": "user", "content": "import os"}], "max_tokens": 1}
        shown = found.head.run(
            f"curl -sS -m 60 http://127.0.0.1:{PORT}/v1/chat/completions -H 'content-type: application/json' "
            f"-H 'x-api-key: {key}' -d {shlex.quote(json.dumps(body))}"
        ).stdout
        if "choices" not in shown:
            raise RuntimeError(f"The app did not answer: {shown}")
        marks.append(time.monotonic())
    finally:
        found.cluster("down")
    return dict(zip(PHASES, (end - start for start, end in itertools.pairwise(marks)), strict=True))


if __name__ == "__main__":
    sys.exit(exit_status(main))
