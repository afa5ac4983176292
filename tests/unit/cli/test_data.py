"""`tandem data` by its own command line, on real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tandem.cli.data import data_app, draw
from tandem.data.index import DatasetIndex, Part
from tandem.data.inspect import inspect_rows
from tandem.data.tokenize import TextEncoder

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"It is [{n}]."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    }
    for n in range(20)
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a dataset of chats and one of preferences."""
    home = tmp_path / "home"
    monkeypatch.setenv("TANDEM_HOME", str(home))
    liked = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea at all."} for n in range(20)]
    for name, lines in (("chats", CHATS), ("liked", liked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        status, out, err = run("build", str(tmp_path / f"{name}.jsonl"), name, "--vocab-size", "300")
        assert status == 0, out + err
    return home


def run(*args: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `tandem data ARGS`."""
    result = CliRunner().invoke(data_app, list(args), env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def test_build_tells_counts_and_the_digest_that_the_index_has(home: Path, tmp_path: Path):
    status, out, _ = run("build", str(tmp_path / "chats.jsonl"), "again", "--vocab-size", "300")
    index = DatasetIndex.load(home / "data" / "again")
    assert status == 0
    characters = sum(len(m["content"]) for chat in CHATS for m in chat["messages"])
    assert f"20 chats, {characters:,} characters" in out and f"digest {index.digest[:12]}" in out
    assert index.characters == characters and all(shard.characters for shard in index.shards)


def test_inspect_shows_documents_apart_and_what_carries_loss(home: Path):
    status, out, _ = run("inspect", "chats", "--rows", "1", "--sequence-length", "128")
    assert status == 0
    assert "20 chats" in out and "000000.tar row 0" in out
    # Brackets in a text are text, not markup.
    assert "It is [0]." in out and "║" in out


def test_inspect_as_json_has_every_token_its_label_and_its_document(home: Path):
    status, out, _ = run("inspect", "chats", "--rows", "2", "--sequence-length", "128", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["kind"], found["samples"], len(found["rows"])) == ("chats", 20, 2)
    encoder = TextEncoder(str(home / "data" / "chats" / "tokenizer"))
    for row in found["rows"]:
        (side,) = row["sides"]
        spans = [span for document in side["documents"] for span in document]
        assert sum(span["tokens"] for span in spans) + side["padding"] == 128 == len(side["ids"]) == len(side["labels"])
        assert len(side["documents"]) == side["positions"].count(0) - bool(side["padding"])
        assert sum(span["tokens"] for span in spans if span["learned"]) == side["learned"]
        text = "".join(span["text"] for span in spans)
        assert text == encoder.tokenizer.decode(side["ids"][: 128 - side["padding"]], skip_special_tokens=False)
        for document in side["documents"]:
            learned = [span["text"] for span in document if span["learned"]]
            assert learned[0].startswith("It is [") and learned[1] == "Yes.<|end|>"


def test_inspect_shows_both_sides_of_preferences(home: Path):
    status, out, _ = run("inspect", "liked", "--rows", "1", "--sequence-length", "64")
    assert status == 0
    assert "row 0, chosen" in out and "row 0, rejected" in out and "No idea at all." in out


def test_what_carries_loss_is_green_and_the_rest_is_dim(home: Path):
    folder = home / "data" / "chats"
    part = Part(folder=folder, location=folder, index=DatasetIndex.load(folder))
    row = next(inspect_rows(part, TextEncoder(str(folder / "tokenizer")), length=128, loss_on_all=False))
    console = Console(force_terminal=True, color_system="standard", width=400)
    with console.capture() as capture:
        console.print(draw(row.sides[0]), soft_wrap=True)
    drawn = capture.get()
    assert "\x1b[32mIt is [0].<|end|>\x1b[0m" in drawn
    assert "\x1b[2m<|begin|><|user|>What is 0?<|end|><|assistant|>\x1b[0m" in drawn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inspect", "chat"), "Did you mean 'chats'"),
        (("inspect", "chat"), "No dataset 'chat': there is neither"),
        (("inspect", "{folder}/chats.jsonl"), "is a file, not a dataset. Make a dataset of it: `tandem data build"),
        (("build", "{folder}/chats.jsonl", "x", "--vocab-size", "10"), "vocab_size is 10; it must be at least 2"),
        (
            ("build", "{folder}/chats.jsonl", "x", "--kind", "pair"),
            "--kind is 'pair'; it must be one of auto, text, pairs",
        ),
        (("inspect", "chats", "--loss-on", "none"), "--loss-on"),
        (("inspect", "chats", "--tokenizer", "nowhere"), "No tokenizer at nowhere"),
        (("build", "nowhere.parquet", "x"), "No corpus at nowhere.parquet"),
    ],
)
def test_what_cannot_be_done_is_said(home: Path, tmp_path: Path, arguments: tuple[str, ...], said: str):
    status, _, err = run(*(each.format(folder=tmp_path) for each in arguments))
    assert status != 0 and said in " ".join(err.split())


def test_rows_past_the_end_are_said_to_be_none(home: Path):
    status, out, _ = run("inspect", "chats", "--skip", "500")
    assert status == 0 and "no row after the first 500" in out


def test_a_build_names_the_files_of_a_folder_that_it_has_not_read(home: Path, tmp_path: Path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.jsonl").write_text((tmp_path / "chats.jsonl").read_text())
    (folder / "README.md").write_text("about the chats")
    status, out, err = run("build", str(folder), "mixed", "--vocab-size", "300")
    assert status == 0, err
    assert "1 files read, 1 not: README.md" in out
