"""What is found out of a run before anything is started."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from small_folders import small_adapter, small_model

from tandem.batch.input.rows import read_row
from tandem.batch.output.write import Output
from tandem.batch.prepare import prepare
from tandem.batch.run import Progress, answer
from tandem.config import BatchConfig
from tandem.errors import ConfigError, DataError, StorageError, UnknownModelError
from tandem.registry import Registry


@pytest.fixture
def registry(tandem_home: Path, tmp_path: Path) -> Registry:
    """Two models, `tiny` with adapters red (two versions, the second a candidate) and blue, and `other`."""
    found = Registry.open()
    for name in ("tiny", "other"):
        found.register_model(name, small_model(tmp_path / name, repr(name)))
    found.register_adapter("red", small_adapter(tmp_path / "red", "1", rank=8), base="tiny")
    found.register_adapter("red", small_adapter(tmp_path / "red2", "2", rank=8), base="tiny", promote=False)
    found.register_adapter("blue", small_adapter(tmp_path / "blue", "3", rank=8), base="tiny")
    return found


def config(tmp_path: Path, rows: list[Any], **changes: Any) -> BatchConfig:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    given = {"input": str(tmp_path / "rows.jsonl"), "model": "tiny", "output": str(tmp_path / "out"), "engine": "echo"}
    return BatchConfig(**{**given, **changes})


ROWS: list[Any] = [
    {"prompt": "a"},
    {"prompt": "b", "model": "red"},
    {"prompt": "c", "model": "other"},
    "{bad",
    {"prompt": "d", "model": "rde"},
    {"prompt": "e", "model": "tiny@1"},
    {"prompt": "f", "model": "red@2"},
]


def test_rows_are_divided_among_the_bases_of_the_models_they_name(registry: Registry, tmp_path: Path) -> None:
    run = prepare(config(tmp_path, ROWS, rows_per_piece=4))
    assert run.survey.bases == ("tiny@1", "other@1")
    assert [dict(chunk.counts) for chunk in run.survey.chunks] == [{"tiny@1": 2, "other@1": 1}, {"tiny@1": 2}]
    assert [unit.name for unit in run.units] == ["00000000-0.jsonl", "00000001-0.jsonl", "00000000-1.jsonl"]
    refused = [json.loads(line) for line in run.survey.refused]
    assert [(line["row"], line["where"].rpartition("/")[2]) for line in refused] == [
        (3, "rows.jsonl line 4"),
        (4, "rows.jsonl line 5"),
    ]
    assert "not valid JSON" in refused[0]["error"]["message"]
    assert "Did you mean 'red'" in refused[1]["error"]["message"] and refused[1]["input"]["prompt"] == "d"
    # As many slots as there are adapters to ask for: none where there are none, as LoRA layers cost something when unused.
    assert [spec.max_adapters for spec, _ in run.bases] == [2, 0]
    assert all(spec.offline for spec, _ in run.bases)


def test_an_adapter_may_be_who_answers_rows_that_name_nobody(registry: Registry, tmp_path: Path) -> None:
    run = prepare(config(tmp_path, ROWS[:3], model="red"))
    assert run.names.default.engine_name == "red@1"
    assert run.survey.bases == ("tiny@1", "other@1") and run.bases[0][0].max_adapters == 1


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "tinny"}, UnknownModelError, "Did you mean 'tiny'"),
        ({"input": "nothing.jsonl"}, DataError, "No input at nothing.jsonl"),
        ({"model": "./nowhere"}, ConfigError, "no model at .*nowhere: it has no config.json"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    registry: Registry, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        prepare(config(tmp_path, ROWS, **{"engine": "vllm", **changes}))
    assert not (tmp_path / "out").exists()


def test_an_input_without_rows_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl has no rows"):
        prepare(config(tmp_path, [""]))


def finished_with_nothing_to_ask(tmp_path: Path) -> BatchConfig:
    """A run that needs no engine, done."""
    wanted = config(tmp_path, ["{bad", {"prompt": "a", "model": "nobody"}])
    seen: list[Progress] = []
    summary = answer(prepare(wanted), seen.append)
    assert (summary.rows, summary.answered, summary.failed) == (2, 0, 2)
    assert seen[-1].done == 2
    return wanted


def test_a_run_of_bad_rows_only_starts_no_engine_and_ends(registry: Registry, tmp_path: Path) -> None:
    wanted = finished_with_nothing_to_ask(tmp_path)
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert [line["row"] for line in errors] == [0, 1]
    assert (tmp_path / "out" / "results.jsonl").read_text() == ""
    again = answer(prepare(wanted))
    assert (again.rows, again.failed, again.found) == (2, 2, 2)


def test_of_two_commands_on_one_output_the_second_finds_the_work_done(registry: Registry, tmp_path: Path) -> None:
    wanted = config(tmp_path, ["{bad"])
    first, second = prepare(wanted), prepare(wanted)
    # The first is done while the second is at it.
    summary = answer(second, lambda progress: [answer(first)].clear())
    assert (summary.failed, summary.found) == (1, 1)
    assert (tmp_path / "out" / "errors.jsonl").read_text().count("\n") == 1


def test_one_command_may_finish_while_the_other_puts_the_files_together(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path, ["{bad"])
    first, second = prepare(wanted), prepare(wanted)
    assemble = Output.assemble

    def overtaken(*arguments: Any) -> tuple[int, int]:
        monkeypatch.setattr(Output, "assemble", assemble)
        answer(first)
        return assemble(*arguments)

    monkeypatch.setattr(Output, "assemble", overtaken)
    assert answer(second).failed == 1
    assert (tmp_path / "out" / "errors.jsonl").read_text().count("\n") == 1
    # One that was prepared before and comes late begins nothing again.
    late = replace(prepare(wanted), manifest=first.manifest)
    assert answer(late).found == 1 and not (tmp_path / "out" / "run" / "pieces").exists()


def test_a_piece_that_is_gone_is_said_and_answered_again(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(tmp_path, ["{bad"])
    run = prepare(wanted)
    with pytest.raises(StorageError, match=r"cannot be made of .*refused.jsonl.* The same command resumes"):
        answer(run, lambda progress: (tmp_path / "out" / "run" / "pieces" / "refused.jsonl").unlink())
    assert answer(prepare(wanted)).failed == 1


def test_a_finished_run_whose_answers_were_removed_is_not_as_before(registry: Registry, tmp_path: Path) -> None:
    wanted = finished_with_nothing_to_ask(tmp_path)
    (tmp_path / "out" / "results.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"results.jsonl is gone, and .*/run says that the run is done. Remove"):
        prepare(wanted)


def test_what_a_kill_left_of_a_finished_run_goes(registry: Registry, tmp_path: Path) -> None:
    wanted = finished_with_nothing_to_ask(tmp_path)
    out = tmp_path / "out"
    (out / "run" / "pieces").mkdir()
    for left in ("run/pieces/00000000-0.jsonl", ".results.jsonl.1f2e.tmp", "run/.manifest.json.1f2e.tmp", ".mine.tmp"):
        (out / left).write_text("x")
    answer(prepare(wanted))
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        ".mine.tmp", "errors.jsonl", "results.jsonl", "run/manifest.json",
    ]  # fmt: skip


def test_a_runs_own_output_is_no_input_of_it(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{bad\n")
    given = {"input": str(folder), "output": str(folder / "answers.jsonl")}
    assert answer(prepare(config(tmp_path, [], **given))).failed == 1
    everything = config(tmp_path, [], **{**given, "input": f"{folder}/**/*.jsonl"})
    for again in (config(tmp_path, [], **given), everything):
        assert answer(prepare(again)).found == 1
    with pytest.raises(DataError, match="holds nothing but the output of this run"):
        prepare(config(tmp_path, [], **{**given, "input": str(folder / "answers.jsonl")}))


def test_an_output_of_another_run_is_refused_with_what_differs(registry: Registry, tmp_path: Path) -> None:
    wanted = finished_with_nothing_to_ask(tmp_path)
    for changes, said in (
        ({"model": "other"}, r"has model = 'tiny', and this one 'other'"),
        ({"request": {"max_tokens": 3}}, r"has request = \{\}, and this one \{'max_tokens': 3\}"),
        ({"engine_args": {"delay_s": 1}}, r"has engine_args = \{\}"),
        ({"rows_per_piece": 5}, r"has rows_per_piece = 64, and this one 5. Leave it out"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare(replace(wanted, **changes))
    prepare(replace(wanted, replicas=4, cpus_per_replica=0.5, window_rows=9))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(
        ConfigError, match=r"The input is not the one .* 1 files with 2 rows, now 1 with 1; .*rows.jsonl changed"
    ):
        prepare(wanted)


def test_the_same_settings_go_on_whatever_json_makes_of_them(registry: Registry, tmp_path: Path) -> None:
    wanted = config(tmp_path, ["{bad"], request={"logit_bias": {50256: -100}, "stop": ("a", "b")})
    first = prepare(wanted)
    first.output.begin(first.manifest.plain())
    assert prepare(wanted).manifest.settings["request"] == {"logit_bias": {"50256": -100}, "stop": ["a", "b"]}
    with pytest.raises(ConfigError, match="has request"):
        prepare(replace(wanted, request={"logit_bias": {50257: -100}, "stop": ("a", "b")}))


def test_a_run_that_was_begun_goes_on_with_its_pieces(registry: Registry, tmp_path: Path) -> None:
    long = {"prompt": "word " * 200_000}
    wanted = config(tmp_path, [long] * 9)
    assert [chunk.rows for chunk in prepare(wanted).survey.chunks] == [5, 4]
    assert [chunk.rows for chunk in prepare(replace(wanted, rows_per_piece=7)).survey.chunks] == [7, 2]
    # One that divided by rows only, as the first format did.
    first = prepare(wanted)
    plain = {**first.manifest.plain(), "format": 1}
    del plain["bytes_per_piece"]
    first.output.begin(plain)
    again = prepare(wanted)
    assert [chunk.rows for chunk in again.survey.chunks] == [9]
    again.output.begin({**again.manifest.plain(), "format": 9})
    with pytest.raises(ConfigError, match=r"another version of Tandem \(format 9, not 4\)"):
        prepare(wanted)


def test_a_name_means_what_it_meant_when_the_run_began(registry: Registry, tmp_path: Path) -> None:
    wanted = config(tmp_path, ROWS)
    first = prepare(replace(wanted, rows_per_piece=3))
    first.output.begin(first.manifest.plain())
    registry.promote("red@2")
    registry.register_adapter("rde", small_adapter(tmp_path / "rde", "4", rank=8), base="tiny")
    again = prepare(wanted)
    assert again.survey.chunks == first.survey.chunks
    assert again.names.find("red").engine_name == "red@1"
    # Somebody who had no name then is refused still: the row may be in a chunk that is published.
    assert len(again.survey.refused) == 2 and "when the run began" in list(again.survey.refused)[1].decode()
    assert prepare(replace(wanted, output=str(tmp_path / "new"))).names.find("red").engine_name == "red@2"


def test_a_pattern_of_files_is_one_input_in_the_order_of_names(registry: Registry, tmp_path: Path) -> None:
    for name, count in (("b", 3), ("a", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name}{i}"}}\n' for i in range(count)))
    run = prepare(config(tmp_path, [], input=str(tmp_path / "[ab].jsonl"), rows_per_piece=2))
    assert [(chunk.source, chunk.first, chunk.rows) for chunk in run.survey.chunks] == [(0, 0, 2), (1, 2, 2), (1, 4, 1)]


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, said in (
        ({"rows_per_piece": 0}, "rows_per_piece is 0"),
        ({"request": {"stream": True}}, "request.stream cannot be set"),
        ({"request": {"model": "x"}}, "request.model cannot be set: set model instead"),
        ({"replicas": 0}, r"^replicas is 0"),
        ({"resources_per_replica": {"GPU": 1.0}}, "names GPU, which has a setting of its own. Set gpus_per_replica"),
        ({"output": ""}, "output is empty"),
        ({"request": {"since": date(2026, 1, 1)}}, "request has a value that JSON has no form for: .*date.* Give it"),
        ({"engine_args": {"delay_s": float("nan")}}, "engine_args has a value that JSON has no form for"),
    ):
        with pytest.raises(ConfigError, match=said):
            BatchConfig(**{"input": "x", "model": "y", "output": "z", **changes})


def test_a_model_of_the_hub_answers_and_stays_the_same_for_the_whole_run(
    registry: Registry, hub: FakeHub, tmp_path: Path
) -> None:
    files = {p.name: p.read_bytes() for p in small_model(tmp_path / "hub-model").iterdir()}
    repo = hub.model("org/tiny", files)
    rows = [{"prompt": "a"}, {"prompt": "b", "model": "org/tiny"}, {"prompt": "c", "model": "org/unknown"}]
    run = prepare(config(tmp_path, rows, model="org/tiny"))
    assert run.survey.bases == ("org/tiny@1",) and run.names.default.base.name == "org/tiny"
    assert run.manifest.models["org/tiny"] == "org/tiny@1"
    # What rows name is looked for here only.
    (refused,) = [json.loads(line) for line in run.survey.refused]
    assert "org/unknown" in json.dumps(refused) and not any("unknown" in path for _, path, _ in hub.requests)
    run.output.begin(run.manifest.plain())
    repo.commit({**files, "config.json": b'{"max_position_embeddings": 8}'})
    hub.requests.clear()
    again = prepare(config(tmp_path, rows, model="org/tiny"))
    assert again.survey.bases == ("org/tiny@1",) and not hub.requests


def test_an_unknown_field_is_an_error_before_anything_starts(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"request\.max_token is not .* Did you mean 'max_tokens'"):
        prepare(config(tmp_path, [{"prompt": "a"}], request={"max_token": 32}))
    chat = {"url": "/v1/completions", "body": {"prompt": "a", "zzz": 1}}
    for row, said in (({"prompt": "a", "temperatur": 1}, "did you mean 'temperature'"), (chat, "unknown field 'zzz'")):
        with pytest.raises(DataError, match=f"rows.jsonl line 2: .*{said}.*Nothing has been started"):
            prepare(config(tmp_path, [{"prompt": "a"}, row]))
    assert not (tmp_path / "out").exists()


def test_columns_of_a_table_that_are_no_fields_are_not_sent(registry: Registry, tmp_path: Path) -> None:
    run = prepare(config(tmp_path, [{"prompt": "a", "reference_answer": "b", "max_tokens": 2}]))
    assert run.survey.rows == 1 and not list(run.survey.refused)
    assert read_row({"prompt": "a", "reference_answer": "b"}, {}).body == {"prompt": "a"}


def test_rows_with_wrong_values_are_refused_before_anything_is_started(registry: Registry, tmp_path: Path) -> None:
    run = prepare(config(tmp_path, [{"prompt": "a"}, {"prompt": "b", "temperature": "hot"}]))
    (refused,) = (json.loads(line) for line in run.survey.refused)
    assert refused["error"]["message"] == "`temperature` is 'hot'; it must be a number from 0 to 2."
    assert not prepare(config(tmp_path, [{"prompt": "b", "n": 0}], output=str(tmp_path / "other"))).units


@pytest.mark.parametrize("version", [1, 2])
def test_a_run_of_an_older_release_is_resumed_without_checks_of_values(
    registry: Registry, tmp_path: Path, version: int
) -> None:
    rows = [{"prompt": "a", "temperature": "hot"}, {"prompt": "b", "model": "other"}, {"prompt": "c"}]
    wanted = config(tmp_path, rows)
    first = prepare(wanted)
    assert first.survey.bases == ("other@1", "tiny@1") and len(first.survey.refused) == 1
    first.output.begin({**first.manifest.plain(), "format": version})
    for _ in range(2):
        again = prepare(wanted)
        assert again.manifest.format == version and not again.manifest.checks_values
        assert not len(again.survey.refused) and dict(again.survey.chunks[0].counts) == {"tiny@1": 2, "other@1": 1}
        # Published units are named by the places of their bases.
        assert again.survey.bases == ("other@1", "tiny@1") and [spec.name for spec, _ in again.bases] == [
            "other",
            "tiny",
        ]
        again.output.begin(again.manifest.plain())
    defaults = {"temperature": "hot"}
    again.output.begin({**again.manifest.plain(), "settings": {**again.manifest.settings, "request": defaults}})
    assert prepare(replace(wanted, request=defaults)).survey.rows == 3


def test_a_run_whose_base_is_asked_by_no_row_any_more_is_refused(registry: Registry, tmp_path: Path) -> None:
    wanted = config(tmp_path, ROWS)
    first = prepare(wanted)
    first.output.begin({**first.manifest.plain(), "bases": ["gone@1", "tiny@1"]})
    with pytest.raises(ConfigError, match=r"began with rows for the model gone@1, and no row is for it now"):
        prepare(wanted)


def test_a_wrong_value_for_all_rows_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^request\.temperature is 'hot'; it must be a number from 0 to 2\.$"):
        prepare(config(tmp_path, ROWS, request={"temperature": "hot"}))


@pytest.mark.parametrize("output", ["rows.jsonl/below", "a-file/below", "a-file"])
def test_an_output_that_cannot_be_made_is_told_with_its_path(registry: Registry, tmp_path: Path, output: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(StorageError, match=r"cannot be made.*(Not a directory|File exists)\. Choose another path"):
        prepare(config(tmp_path, ROWS, output=str(tmp_path / output)))
    with pytest.raises(StorageError, match=r"cannot be made.*No such file or directory\. Choose another path"):
        prepare(config(tmp_path, ROWS, output="/proc/nowhere/out"))


@pytest.mark.parametrize("where", ["input", "output"])
def test_a_store_without_credentials_is_told_with_their_names(
    registry: Registry, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    # s3fs keeps one client for a process: a test before this one had credentials, and those after it have them again.
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=r"cannot be read: NoCredentialsError.*AWS_ACCESS_KEY_ID") as refused:
            prepare(config(tmp_path, ROWS, **{where: "s3://tandem-nobody/x.jsonl"}))
    finally:
        S3FileSystem.clear_instance_cache()
    assert "\n" not in str(refused.value)
