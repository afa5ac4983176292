"""`tandem train sweep`: run trials over config values in parallel, and register the best model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from tandem.cli.support.shell import friendly_errors
from tandem.cluster.local import Cluster
from tandem.config import apply_overrides
from tandem.config.load import read_yaml
from tandem.config.training.sweep import METRICS, parse_parameter, plan_trials
from tandem.jobs.client import JobClient
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.sweep import TRIAL_ACTOR_CPUS, SweepFolder, SweepPlan, prepare_sweep, score, stop_sweep
from tandem.observability.codec import decode, from_json, to_json
from tandem.observability.events import Evaluated, Failed, Step, SweepFinished, SweepStarted, TrialReported
from tandem.sdk.cluster import open_cluster, uninterrupted
from tandem.sdk.console import INTERRUPTED, console
from tandem.sdk.summary import print_result

OTHER_LINES_KEPT = 200
"""Newest lines of the log that are not events, which are shown when a sweep fails."""
COLOURS = {"finished": "green", "failed": "red", "running": "cyan", "stopped": "yellow"}


ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The job as YAML (see train_apps/recipes).")]
ParamsOption = Annotated[
    list[str],
    typer.Option(
        "--param",
        "-p",
        metavar="KEY=...",
        help="Values to try, such as optimizer.learning_rate=1e-3,3e-3 or =loguniform(1e-4,1e-2); also uniform, randint.",
    ),
]
TrialsOption = Annotated[
    int | None, typer.Option("--trials", help="How many trials; unset: all combinations of the values.")
]
MetricOption = Annotated[str, typer.Option("--metric", help=f"What they are compared by: {', '.join(METRICS)}.")]
SeedOption = Annotated[
    int, typer.Option("--seed", help="Of what is drawn at random: the same seed gives the same trials.")
]
OverridesOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the config.")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRequest:
    """What a person asks for."""

    config: Path
    params: list[str]
    trials: int | None
    metric: str
    seed: int
    overrides: list[str]

    def prepare(self, *, parallel: int | None) -> SweepFolder:
        """The folders of the sweep and its trials; an error with what to change. `parallel`: trials at once; None: all."""
        planned = plan_trials([parse_parameter(text) for text in self.params], self.trials, seed=self.seed)
        values = apply_overrides(read_yaml(self.config), self.overrides)
        return prepare_sweep(values, planned, metric=self.metric, parallel=parallel or len(planned))


def sweep_command(
    config: ConfigOption,
    params: ParamsOption,
    trials: TrialsOption = None,
    metric: MetricOption = "loss",
    parallel: Annotated[
        int | None, typer.Option(help="Trials at once; unset: as many as the cluster has room for.")
    ] = None,
    seed: SeedOption = 0,
    overrides: OverridesOption = [],  # noqa: B006
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return at once; the sweep continues.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Print the log as it is instead of a table.")] = False,
) -> None:
    """Try values for keys of a config, each as a job of its own; the best model is registered under the config's name."""
    with friendly_errors():
        request = SweepRequest(
            config=config, params=params, trials=trials, metric=metric, seed=seed, overrides=overrides
        )
        sweep = request.prepare(parallel=parallel)
        raise SystemExit(submit_sweep(sweep, share_cores=parallel is None, detach=detach, raw=raw))


def submit_sweep(sweep: SweepFolder, *, share_cores: bool, detach: bool = False, raw: bool = False) -> int:
    """Submit a sweep to the cluster at RAY_ADDRESS, or to a local one, and follow it; returns its exit status.

    `share_cores`: on a local cluster, state no more CPUs than the machine has cores for, so that trials do not slow each other.
    """
    plan = sweep.plan()
    console.print(f"Sweep [bold]{sweep.id}[/]: {len(plan.trials)} trials")
    if end := sweep.finished():
        say_swept(sweep, end)
        return 0
    with open_cluster(num_cpus=cpus_for(sweep, share_cores=share_cores), keep=detach) as cluster:
        if detach:
            JobClient(cluster).submit(sweep)
            console.print(f"Submitted. `tandem train status {sweep.id}` tells how it is.")
            return 0
        return follow_sweep(cluster, sweep, raw=raw)


def follow_sweep(cluster: Cluster, sweep: SweepFolder, *, raw: bool = False) -> int:
    """Submit a prepared sweep and show it until it is over; returns its exit status.

    Ctrl-C stops a sweep on a cluster of our own, and lets go of one on any other.
    """
    client = JobClient(cluster)
    submission = client.submit(sweep)
    with SweepView(console, sweep.plan(), raw=raw) as view:
        try:
            for line in client.follow(submission):
                view.show(line)
        except BaseException as left:
            if not isinstance(left, KeyboardInterrupt | SystemExit):
                raise
            if not cluster.owned:
                console.print(f"\nThe sweep continues. `tandem train stop {sweep.id}` ends it.")
                return INTERRUPTED
            with uninterrupted():
                stop_sweep(client, sweep, timeout_s=10)
            console.print("\nStopped. The same command resumes with the trials that are not finished.")
            raise
    status = client.exit_status(submission)
    if status == 0 and (end := sweep.finished()):
        say_swept(sweep, end, table=raw or not console.is_terminal)
    elif client.state(submission) is JobState.STOPPED:
        console.print(
            f"[yellow]{sweep.id} was stopped.[/] The same command resumes with the trials that are not finished."
        )
    elif status != 0:
        failed = sweep.last(Failed)
        reason = (failed.error if failed else "") or "\n".join(view.other_lines[-15:]) or client.message(submission)
        console.print(f"[bold red]{sweep.id} failed:[/] {escape(str(reason))}", soft_wrap=True)
    return status or (0 if sweep.finished() else 1)


class SweepView:
    """Shows a sweep's log: a table that lives where there is a terminal, else a line for each trial that begins or ends."""

    def __init__(self, output: Console, plan: SweepPlan, *, raw: bool = False) -> None:
        self.console, self.plan, self.raw = output, plan, raw
        self.other_lines: list[str] = []
        """The newest lines of the log that are not events."""
        self._reports: dict[int, TrialReported] = {}
        self._live = Live(console=output, auto_refresh=False) if output.is_terminal and not raw else None

    def __enter__(self) -> SweepView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, line: str) -> None:
        """Show one line of the sweep's log."""
        if self.raw:
            self.console.print(line, markup=False, soft_wrap=True)
            return
        values = decode(line)
        if values is None:
            self.other_lines = [*self.other_lines[-OTHER_LINES_KEPT:], line]
            return
        match from_json(values):
            case SweepStarted(parallel=parallel, trials=trials):
                self.console.print(f"  [dim]·[/] {parallel} of {trials} at once")
            case TrialReported() as event:
                self._take(event)
            case SweepFinished(best=best) if self._live is not None:
                self._live.update(trials_table(self.plan, self._reports, best=best), refresh=True)

    def _take(self, event: TrialReported) -> None:
        before = self._reports.get(event.trial)
        known = before.numbers if before else {}
        self._reports[event.trial] = replace(event, numbers={**known, **event.numbers})
        if self._live is not None:
            self._live.update(trials_table(self.plan, self._reports), refresh=True)
        elif (before is None or event.state != before.state) and event.state != JobState.PENDING:
            loss = f", loss {event.numbers['loss']:.3f}" if "loss" in event.numbers else ""
            trial = " ".join(f"{k}={v}" for k, v in self.plan.trials[event.trial - 1].items())
            why = f": {escape(event.error)}" if event.error is not None else ""
            self.console.print(
                f"  [dim]·[/] trial {event.trial} ({escape(trial)}) {event.state}{loss}{why}", soft_wrap=True
            )


def trials_table(plan: SweepPlan, reports: Mapping[int, TrialReported], *, best: int | None = None) -> Table:
    """A row for each trial: its values, and what is known of it by its number (from 1)."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("trial", justify="right")
    for key in plan.trials[0]:
        # The last word says it; the whole key is in the command.
        table.add_column(key.rpartition(".")[2], justify="right")
    table.add_column("state")
    shown = [("step", "step"), ("loss", "loss"), ("tok/s", "tokens_per_s")]
    if plan.metric not in dict(shown).values():
        shown.append((plan.metric, plan.metric))
    for title, _ in shown:
        table.add_column(title, justify="right")
    for number, trial in enumerate(plan.trials, 1):
        report = reports.get(number)
        state, numbers = (report.state, report.numbers) if report else ("waiting", {})
        table.add_row(
            f"[green]★[/] {number}" if number == best else str(number),
            *(escape(value) for value in trial.values()),
            f"[{COLOURS.get(state, 'white')}]{state}[/]",
            *(_cell(key, numbers) for _, key in shown),
        )
    return table


def _cell(key: str, numbers: Mapping[str, float]) -> str:
    value = numbers.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    if key == "step":
        return f"{value:.0f}/{numbers['steps']:.0f}" if "steps" in numbers else f"{value:.0f}"
    return f"{value:,.0f}" if key in ("tokens_per_s", "memory_bytes") else f"{value:.4f}"


def trial_reports(jobs: Iterable[JobFolder], metric: str, client: JobClient | None = None) -> dict[int, TrialReported]:
    """State and numbers of each trial by its job's folder, and by the cluster if there is one."""
    reports = {}
    for number, job in enumerate(jobs, 1):
        sent = job.submissions()
        summary = job.summary(client.state(str(sent[-1]["id"])) if client and sent else None)
        step, evaluation = job.last(Step), job.last(Evaluated)
        numbers = {
            **(to_json(step) if step else {}),
            "evaluation_loss": evaluation.measured.get("loss") if evaluation else None,
            metric: score(metric, job.typed_events()),
        }
        reports[number] = TrialReported(
            trial=number,
            state="waiting" if summary.state is JobState.NEW else str(summary.state),
            numbers={key: value for key, value in numbers.items() if isinstance(value, int | float)},
        )
    return reports


def say_swept(sweep: SweepFolder, end: SweepFinished, *, table: bool = True) -> None:
    """Print the trials of a sweep that is done, and its best one."""
    plan = sweep.plan()
    if table:
        console.print(trials_table(plan, trial_reports(sweep.jobs(), plan.metric), best=end.best))
    values = " ".join(f"--set {key}={value}" for key, value in plan.trials[end.best - 1].items())
    console.print(
        f"\nThe best is trial {end.best}, with a {plan.metric} of {end.score or math.nan:.4g}: {escape(values)}",
        soft_wrap=True,
    )
    print_result(sweep.jobs()[end.best - 1])


def say_sweep(sweep: SweepFolder, client: JobClient | None) -> None:
    """Print how a sweep stands."""
    if end := sweep.finished():
        say_swept(sweep, end)
        return
    plan = sweep.plan()
    console.print(trials_table(plan, trial_reports(sweep.jobs(), plan.metric, client)))


def cpus_for(sweep: SweepFolder, *, share_cores: bool) -> int:
    """CPUs that a local cluster states: as many as the trials that run at once ask for.

    With `share_cores`, that is as many trials as have a core for each worker.
    """
    configs = [job.config() for job in sweep.jobs()]
    workers = max(config.parallel.workers * config.parallel.cpus_per_worker for config in configs)
    readers = max(config.data.readers for config in configs)
    cores = os.cpu_count() or 1
    at_once = max(1, int(cores // workers)) if share_cores and workers else sweep.plan().parallel
    return max(cores, math.ceil(at_once * (workers + readers + TRIAL_ACTOR_CPUS)))
