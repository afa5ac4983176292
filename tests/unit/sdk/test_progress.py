"""A job's log becomes progress that a person can read."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from tandem.observability import codec, events
from tandem.sdk.progress import EtaEstimator, JobView, duration, event_sentence, log_line


def shown(*lines: str, raw: bool = False) -> tuple[str, JobView]:
    out = io.StringIO()
    with JobView(Console(file=out, width=120), "job", raw=raw) as view:
        view.follow(lines)
    return out.getvalue(), view


STARTED = codec.encode(
    {"event": "started", "parameters": 2_400_000, "trainable": 1000, "workers": 2, "layout": "fsdp2", "steps": 10}
)


def step(n: int) -> str:
    return codec.encode({"event": "step", "step": n, "steps": 10, "loss": 3.25, "tokens_per_s": 8000.0})


def test_loss_and_throughput_are_said_where_there_is_no_terminal() -> None:
    text, _ = shown(STARTED, step(1), step(2))
    assert "2,400,000 parameters" in text
    assert "step 2/10" in text
    assert "loss 3.250" in text
    assert "8,000 tok/s" in text


def test_an_evaluation_is_said_with_all_that_it_measured() -> None:
    measured = {"loss": 0.51234, "reward_margin": 1.5, "reward_accuracy": 0.75}
    text, _ = shown(STARTED, codec.encode({"event": "evaluation", "step": 4, "rows": 64, "averaged": True, **measured}))
    assert "evaluation at step 4: loss 0.512, reward margin 1.5, reward accuracy 0.75 (64 rows)" in text


def test_a_restart_is_said_with_its_reason() -> None:
    text, _ = shown(STARTED, codec.encode({"event": "restart", "reason": "worker 1 died [SIGKILL]"}))
    assert "restarted: worker 1 died [SIGKILL]" in text


def test_the_closing_event_is_kept_and_other_lines_are_remembered() -> None:
    _, view = shown(STARTED, "Traceback: x", codec.encode({"event": "failed", "error": "disk full"}))
    assert view.ended is not None
    assert view.ended == events.Failed(error="disk full", time=view.ended.time)
    assert view.other_lines == ["Traceback: x"]


def test_raw_prints_every_line_as_it_is() -> None:
    text, _ = shown(STARTED, "plain [line]", raw=True)
    assert "plain [line]" in text
    assert "@tandem" in text


FULL_STEP = {
    "event": "step", "step": 123_456, "steps": 1_000_000, "loss": 12.3456, "grad_norm": 123.456, "tokens_per_s": 1_234_567.8,
    "tokens": 1, "seconds": 1000.0, "mfu": 0.4567, "memory_bytes": 79 * 2**30, "learning_rate": 1e-3,
}  # fmt: skip


def test_a_terminal_of_80_columns_shows_every_number_of_a_step_on_two_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with JobView(console, "a-model-with-a-name-far-too-long-for-a-line") as view:
        view.show(codec.encode({"event": "started", "steps": 1_000_000, "workers": 2, "layout": "fsdp2"}))
        view.show(codec.encode({**FULL_STEP, "step": 123_356, "seconds": 900.0}))
        view.show(codec.encode(FULL_STEP))
    # A frame is drawn over the one before: the cursor goes back.
    bar, numbers = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").strip().splitlines()[-2:]
    assert len(bar) <= 80 and len(numbers) <= 80
    assert bar.startswith("a-model-with-a-name-fa") and "123456/1000000" in bar
    assert bar.rstrip().endswith("10 d 3 h left")
    assert numbers.strip().split("  ") == ["loss 12.346", "grad norm 123", "1,234,568 tok/s", "MFU 45.7 %", "79.00 GiB"]


def test_an_evaluation_and_a_notice_get_a_line() -> None:
    text, _ = shown(
        STARTED,
        codec.encode({"event": "evaluation", "step": 50, "loss": 2.0, "perplexity": 7.389}),
        codec.encode({"event": "notice", "message": "MLflow gets no more numbers: [Errno 111]"}),
    )
    assert "evaluation at step 50: loss 2.000, perplexity 7.389" in text
    assert "MLflow gets no more numbers: [Errno 111]" in text


def test_the_time_to_finish_follows_the_jobs_own_clock() -> None:
    pace = EtaEstimator()

    def remaining_s(step: int, seconds: float) -> float | None:
        return pace.remaining_s(events.Step(step=step, steps=100, seconds=seconds))

    assert remaining_s(10, 5.0) is None
    assert remaining_s(20, 25.0) == pytest.approx(160)
    assert remaining_s(15, 1.0) is None, "after a restart there is no pace yet"
    assert remaining_s(16, 2.0) == pytest.approx(84)
    assert remaining_s(100, 90.0) == 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.6, "5 s"), (185, "3:05 min"), (7620, "2:07 h"), (3 * 86400 + 4 * 3600, "3 d 4 h")]
)
def test_a_duration_is_said_in_units_that_fit(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_line_in_a_file_is_not_broken_at_80_columns() -> None:
    out = io.StringIO()
    with JobView(Console(file=out, width=80, force_terminal=False), "job") as view:
        view.show(codec.encode({**FULL_STEP, "step": 1_000_000, "steps": 1_000_000}))
    (line,) = (line for line in out.getvalue().splitlines() if "step 1000000/1000000" in line)
    assert len(line) > 80 and line.endswith("GiB")


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (FULL_STEP, "step 123456/1000000  loss "),
        ({"event": "checkpoint", "step": 4, "path": "/home/jobs/a/4"}, "checkpoint of step 4: /home/jobs/a/4"),
        ({"event": "fault", "kind": "node", "rank": 1, "reason": "node b went"}, "fault (node): node b went"),
        ({"event": "failed", "error": "no [space] left"}, "failed: no [space] left"),
        ({"event": "notice", "message": "a [notice]"}, "a [notice]"),
        ({"event": "left", "step": 7}, "left: step 7"),
        ({"event": "finished", "loss": 1.5, "steps": 7, "seconds": 3.0}, "loss 1.500 after 7 steps, 3 s"),
    ],
)
def test_an_event_in_a_log_is_a_line_in_words_with_its_time(event: dict[str, object], said: str) -> None:
    typed = codec.from_json({**event, "time": 0.0})
    assert typed is not None
    line = log_line(typed)
    assert re.match(r"19(70|69)-\d\d-\d\d \d\d:\d\d:\d\d  ", line)
    assert line[21:].startswith(said)


def test_workers_on_several_nodes_are_said() -> None:
    started = events.Started(workers=4, layout="fsdp2", parameters=10, nodes=2)
    assert "4 workers on 2 nodes, fsdp2" in str(event_sentence(started))
    assert "4 workers, fsdp2" in str(event_sentence(replace(started, nodes=1)))


def test_an_event_of_a_kind_that_this_release_does_not_know_is_not_shown_as_output() -> None:
    text, view = shown(STARTED, codec.encode({"event": "moved", "to": "mars"}))
    assert "mars" not in text and view.other_lines == []
