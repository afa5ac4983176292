"""`tandem batch run` by its own command line, as far as no engine is needed; and its progress."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from small_folders import small_model
from typer.testing import CliRunner

import tandem
from tandem.batch.run import Progress
from tandem.cli.main import app
from tandem.errors import ConfigError
from tandem.sdk import batch


def run(*arguments: str) -> tuple[int, str]:
    """Exit status, and all that was printed."""
    result = CliRunner().invoke(app, ["batch", "run", *arguments], env={"COLUMNS": "250"})
    return result.exit_code, result.output


@pytest.fixture
def rows(tandem_home: Path, tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{bad\n{"prompt": "a", "model": "nobody"}\n')
    return tmp_path / "rows.jsonl"


def test_what_is_missing_or_unknown_ends_with_the_configs_status(rows: Path, tmp_path: Path) -> None:
    assert run("--model", "x") == (2, "Error input is missing.\n")
    status, said = run("-i", str(rows), "-m", "parrot", "-o", str(tmp_path / "out"), "-s", "window_row=3")
    assert status == 2 and "window_row is not a setting. Did you mean 'window_rows'?" in said
    status, said = run("-i", str(rows) + "x", "-m", "parrot", "-o", str(tmp_path / "out"))
    assert status == 1 and "Did you mean 'rows.jsonl'" in said
    status, said = run("-i", str(rows), "-m", "parrot", "-o", str(tmp_path / "out"))
    assert status == 1 and "No model or adapter 'parrot' is registered" in said
    assert not (tmp_path / "out").exists()


def test_a_config_is_a_file_whose_values_options_win_over(rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"input: {rows}\nmodel: other\nengine: echo\noutput: {tmp_path}/y.jsonl\nwindow: 3\n")
    status, said = run("-c", str(config))
    assert status == 2 and "run.yaml line 5" in said
    config.write_text(config.read_text().replace("window: 3\n", ""))
    status, said = run("-c", str(config), "-m", "parrot")
    assert status == 3 and "0 of 2 rows answered" in said and "2 rows have no answer; why is in" in said
    assert "already" not in said
    assert (tmp_path / "y.jsonl").read_text() == ""
    assert (tmp_path / "y.errors.jsonl").read_text().count("\n") == 2
    status, said = run("-c", str(config), "-m", "parrot")
    assert status == 3 and "0 of 2 rows answered, as before" in said
    status, said = run("-c", str(config))
    assert status == 2 and "has model = 'parrot', and this one 'other'" in said


def test_from_python_it_is_a_function_that_tells_how_it_ended(rows: Path, tmp_path: Path) -> None:
    summary = tandem.run_batch(rows, model="parrot", output=tmp_path / "out", engine="echo")
    assert (summary.rows, summary.answered, summary.failed) == (2, 0, 2)
    assert Path(summary.errors).read_text().count("\n") == 2


def test_where_there_is_no_terminal_progress_is_said_ten_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(batch, "console", Console(file=out, width=100, color_system=None))
    prepared: Any = SimpleNamespace(survey=SimpleNamespace(rows=1000))
    with batch._Bar(prepared) as bar:
        bar.tell(Progress(rows=1000, done=200, failed=2, found=198))
        for done in range(200, 1001, 5):
            bar.tell(Progress(rows=1000, done=done, failed=done // 500, tokens=done))
    lines = [line for line in out.getvalue().splitlines() if "·" in line]
    assert "198 of 1,000 rows are there already" in lines[0]
    assert "2 of 1,000 rows cannot be asked" in lines[1]
    assert 9 <= len(lines) <= 12 and "1,000 of 1,000 rows" in lines[-1] and "2 failed" in lines[-1]


def test_a_fresh_run_says_nothing_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(batch, "console", Console(file=out, width=100, color_system=None))
    prepared: Any = SimpleNamespace(survey=SimpleNamespace(rows=20))
    with batch._Bar(prepared) as bar:
        bar.tell(Progress(rows=20, done=2, failed=2))
    assert "already" not in out.getvalue() and "2 of 20 rows cannot be asked" in out.getvalue()


@pytest.mark.parametrize(
    ("template", "rows", "options", "warned"),
    [
        ("{{ messages }}", '{"prompt": "a"}', [], True),
        ("{{ messages }}", '{"prompt": "a"}', ["--chat"], False),
        ("{{ messages }}", '{"messages": [{"role": "user", "content": "a"}]}', [], False),
        ("{{ messages }}", '{"url": "/v1/completions", "body": {"prompt": "a"}}', [], False),
        (None, '{"prompt": "a"}', [], False),
    ],
)
def test_plain_prompts_for_a_model_with_a_chat_template_are_warned_of(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    template: str | None, rows: str, options: list[str], warned: bool,
) -> None:  # fmt: skip
    model = small_model(tmp_path / "talker")
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text(rows)
    # What comes after would start a cluster.
    monkeypatch.setattr(batch, "_run", lambda config, run: (_ for _ in ()).throw(ConfigError("no further")))
    _, said = run("-i", str(tmp_path / "rows.jsonl"), "-m", str(model), "-o", str(tmp_path / "out"), *options)
    assert ("go to talker as they are, without its chat template. --chat" in said) == warned
    assert "no further" in said


def test_a_file_that_cannot_be_read_is_not_suggested(tandem_home: Path, tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text("{}")
    status, said = run("-i", str(tmp_path / "openapi.jso"), "-m", "parrot", "-o", str(tmp_path / "out"))
    assert status == 1 and "No input at" in said and "Did you mean" not in said
