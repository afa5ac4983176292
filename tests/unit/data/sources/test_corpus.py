"""Corpora read the same each time, and name the line that is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.sources import stdlib
from tandem.data.sources.corpus import folder_files, open_corpus, split_text
from tandem.data.sources.samples import Chat, Message, Pair, Preference, Sample, Text, sample_of, size
from tandem.errors import DataError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_standard_library_asks_at_least_64_questions_once_each():
    questions = list(stdlib.questions())
    assert len(questions) >= 64
    assert len({q for q, _ in questions}) == len({a for _, a in questions}) == len(questions)
    assert dict(questions)["What does os.path.join do?"].startswith("Join two or more pathname components")
    assert all(16 <= len(answer) <= 64 and answer.isascii() for _, answer in questions)
    assert questions == list(stdlib.questions())


def test_the_standard_library_is_some_megabytes_of_text():
    texts = list(open_corpus("stdlib").samples())
    assert sum(map(size, texts)) > 5_000_000
    assert texts[:5] == list(open_corpus("stdlib").samples())[:5]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.  And more.", "Return x."),
        ("Return the\n    real path.\n\nMore.", "Return the real path."),
        ("see below", None),
        ("No full stop here", None),
        ("Example: x.", None),
        ("", None),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring: str, sentence: str | None):
    assert stdlib.first_sentence(docstring) == sentence


def test_a_corpus_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path):
    write(tmp_path / "reviews.jsonl", '{"text": "x"}\n')
    with pytest.raises(DataError, match="Did you mean 'reviews.jsonl'"):
        open_corpus(str(tmp_path / "review.jsonl"))
    with pytest.raises(DataError, match="Did you mean 'stdlib'"):
        open_corpus("stdlb")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 3 is not valid JSON"),
        ("[1]", "line 3 is a list"),
        ('{"prompt": "p"}', "line 3 has the keys prompt"),
        ('{"prompt": "p", "answer": 5}', "line 3: 'answer' is a int"),
        ('{"text": "a text"}', "line 3 is of another kind than pairs"),
        (b'{"prompt": "\xff", "answer": "x"}', "line 3 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, said: str):
    data = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "pairs.jsonl", b'{"prompt": "p", "answer": "a"}\n\n' + data + b"\n")
    with pytest.raises(DataError) as caught:
        list(open_corpus(path).samples())
    assert said in str(caught.value) and "pairs.jsonl" in str(caught.value)


def test_both_spellings_of_pairs_and_blank_ones_left_out(tmp_path: Path):
    path = write(
        tmp_path / "p.jsonl",
        '{"input": "q", "output": "r"}\n{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "  "}\n',
    )
    assert list(open_corpus(path).samples()) == [Pair("q", "r"), Pair("a", "b")]


def test_preferences_are_read_and_those_without_a_difference_left_out(tmp_path: Path):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "q", "chosen": "good", "rejected": "bad"}\n'
        '{"prompt": "q", "chosen": "same", "rejected": "same"}\n'
        '{"prompt": "q", "chosen": " ", "rejected": "bad"}\n',
    )
    corpus = open_corpus(path)
    assert corpus.kind == "preferences"
    assert list(corpus.samples()) == [Preference("q", "good", "bad")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "chosen": "c"}', 'line 2 has the keys prompt, chosen; it needs .*"chosen" and "rejected"'),
        ('{"prompt": "p", "chosen": "c", "rejected": ["r"]}', "line 2: 'rejected' is a list"),
        ('{"prompt": "p", "answer": "a"}', "line 2 is of another kind than preferences"),
    ],
)
def test_a_bad_line_among_preferences_is_named(tmp_path: Path, line: str, said: str):
    path = write(tmp_path / "p.jsonl", '{"prompt": "q", "chosen": "good", "rejected": "bad"}\n' + line + "\n")
    with pytest.raises(DataError, match=said):
        list(open_corpus(path).samples())


def test_the_standard_library_prefers_an_answer_to_that_of_another_question():
    found = list(open_corpus("stdlib-preferences").samples())
    answers = dict(stdlib.questions())
    assert len(found) == len(answers)
    for sample in found:
        assert isinstance(sample, Preference)
        assert answers[sample.prompt] == sample.chosen != sample.rejected in answers.values()


def test_a_kind_that_the_file_does_not_hold_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds text, and kind is pairs"):
        open_corpus(write(tmp_path / "a.txt", "words"), "pairs")


def test_a_small_text_file_gives_many_samples_and_loses_nothing(tmp_path: Path):
    text = "".join(f"Paragraph {n} says something.\n\n" for n in range(500))
    samples = list(open_corpus(write(tmp_path / "a.txt", text)).samples())
    assert len(samples) > 16
    assert "".join(s.text for s in samples if isinstance(s, Text)) == text


def test_cutting_keeps_long_lines_whole():
    assert list(split_text("a" * 50 + "\n" + "b", 10)) == ["a" * 50 + "\n", "b"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "sub" / "c.py", "third")
    write(tmp_path / "image.png", b"\x89PNG")
    assert [s.text for s in open_corpus(str(tmp_path)).samples() if isinstance(s, Text)] == ["first", "second", "third"]


RECORDS = {
    "text": [{"text": f"line {n}", "id": n} for n in range(2500)],
    "pairs": [{"prompt": f"q{n}", "answer": f"a{n}"} for n in range(5)],
    "preferences": [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": "no"} for n in range(5)],
    "chats": [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(5)
    ],
}


def as_file(folder: Path, form: str, records: list[dict[str, Any]]) -> Path:
    """The records in a file, or in a folder, of a form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    match form:
        case "jsonl":
            return Path(write(folder / "a.jsonl", "".join(json.dumps(r) + "\n" for r in records)))
        case "jsonl.gz":
            lines = "".join(json.dumps(r) + "\n" for r in records)
            return Path(write(folder / "a.jsonl.gz", gzip.compress(lines.encode())))
        case "parquet":
            pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=700)
            return folder / "a.parquet"
        case "parquet folder":
            # As the hub lays a dataset out.
            (folder / "hub" / "data").mkdir(parents=True)
            write(folder / "hub" / "README.md", "# A dataset")
            for number, part in enumerate((records[:3], records[3:])):
                table = pa.Table.from_pylist(part)
                pq.write_table(table, folder / "hub" / "data" / f"train-0000{number}-of-00002.parquet")
            return folder / "hub"
        case "saved" | "saved splits":
            # What `datasets.save_to_disk` writes: streams of Arrow, and a state.json that names them.
            saved = folder / "saved" / ("train" if form == "saved splits" else "")
            saved.mkdir(parents=True)
            for number, part in enumerate((records[:3], records[3:])):
                table = pa.Table.from_pylist(part)
                with pa.OSFile(str(saved / f"data-{number}.arrow"), "wb") as sink:
                    with pa.ipc.new_stream(sink, table.schema) as writer:
                        writer.write_table(table)
            state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}], "_split": "train"}
            write(saved / "state.json", json.dumps(state))
            if form == "saved splits":
                write(folder / "saved" / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
            return folder / "saved"
        case "webdataset":
            import webdataset

            (folder / "shards").mkdir()
            with webdataset.ShardWriter(str(folder / "shards" / "%04d.tar"), maxcount=2000, verbose=0) as writer:
                for number, record in enumerate(records):
                    kept = {"txt": record["text"]} if "text" in record else {"json": record}
                    writer.write({"__key__": f"part/{number:05d}", **kept, "cls": number})
            return folder / "shards"
    raise AssertionError(form)


FORMS = ["jsonl", "jsonl.gz", "parquet", "parquet folder", "saved", "saved splits", "webdataset"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", list(RECORDS))
def test_every_kind_is_read_from_every_form(tmp_path: Path, form: str, kind: str):
    records = RECORDS[kind]
    corpus = open_corpus(str(as_file(tmp_path, form, records)))
    assert corpus.kind == kind
    expected = {
        "text": lambda r: Text(r["text"]),
        "pairs": lambda r: Pair(r["prompt"], r["answer"]),
        "preferences": lambda r: Preference(r["prompt"], r["chosen"], r["rejected"]),
        "chats": lambda r: Chat(tuple(Message(**m) for m in r["messages"])),
    }[kind]
    assert list(corpus.samples()) == [expected(record) for record in records] == list(corpus.samples())


@pytest.mark.parametrize("form", ["parquet", "saved", "webdataset"])
def test_a_record_that_cannot_be_used_is_named_in_every_form(tmp_path: Path, form: str):
    records = [{"prompt": "q", "answer": "a"}] * 4 + [{"prompt": "q", "answer": None}]
    corpus = open_corpus(str(as_file(tmp_path, form, records)))
    position = {"parquet": "a.parquet row 5", "saved": "data-1.arrow row 2", "webdataset": "0000.tar sample part/00004"}
    with pytest.raises(DataError, match=f"{position[form]}: 'answer' is empty; it must be a string"):
        list(corpus.samples())


@pytest.mark.parametrize(("name", "form"), [("a.parquet", "Parquet"), ("a.arrow", "Arrow"), ("a.tar", "a tar file")])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, form: str):
    with pytest.raises(DataError, match=f"{name} cannot be read as {form}"):
        open_corpus(write(tmp_path / name, b"not what the name says" * 40))
    with pytest.raises(DataError, match=r"b.jsonl.gz cannot be read"):
        open_corpus(write(tmp_path / "b.jsonl.gz", b"not compressed"))


def test_a_folder_of_two_sorts_or_without_the_split_to_take_is_refused(tmp_path: Path):
    as_file(tmp_path, "jsonl", RECORDS["text"])
    as_file(tmp_path, "parquet", RECORDS["text"])
    with pytest.raises(DataError, match=r"files of 2 sorts \(a.jsonl, a.parquet\)"):
        open_corpus(str(tmp_path))
    write(tmp_path / "dataset_dict.json", '{"splits": ["validation", "test"]}')
    with pytest.raises(DataError, match="splits validation, test and no 'train'. Name one: .*/validation"):
        open_corpus(str(tmp_path))


def test_a_built_dataset_can_be_built_again(tmp_path: Path):
    from tandem.data.build import build_dataset

    source = as_file(tmp_path, "jsonl", RECORDS["chats"])
    first = build_dataset(str(source), tmp_path / "first", vocab_size=300)
    again = build_dataset(str(tmp_path / "first"), tmp_path / "again", tokenizer=tmp_path / "first" / "tokenizer")
    assert (again.kind, again.digest) == ("chats", first.digest)
    assert again.characters == sum(len("q0") + len("a0") for _ in range(5))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "q", "answer": "a"}, Pair("q", "a")),
        ({"prompt": "q", "completion": "a"}, Pair("q", "a")),
        ({"prompt": "q", "response": "a"}, Pair("q", "a")),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, Pair("Add.\n\n1, 2", "3")),
        ({"instruction": "Say hi.", "input": "", "output": "hi"}, Pair("Say hi.", "hi")),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            Chat((Message("user", "q"), Message("assistant", "a"))),
        ),
    ],
)
def test_the_usual_names_of_fields_are_known(record: dict[str, Any], expected: Sample):
    assert sample_of(record, "here") == expected


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "'messages' is a str; it must be a list of messages"),
        ([], "'messages' is empty; it must be a list"),
        ([{"role": "user", "content": "q"}, {"role": "user"}], r"'messages' \[1\] is not a message"),
    ],
)
def test_a_chat_that_is_none_is_named(messages: Any, said: str):
    with pytest.raises(DataError, match=f"line 7: {said}"):
        sample_of({"messages": messages}, "line 7")


def test_a_chat_in_which_the_assistant_says_nothing_is_left_out(tmp_path: Path):
    asked = {"messages": [{"role": "user", "content": "q"}]}
    path = write(tmp_path / "c.jsonl", "".join(json.dumps(r) + "\n" for r in (asked, *RECORDS["chats"])))
    assert len(list(open_corpus(path).samples())) == 5


def test_a_folder_of_text_and_records_is_refused_with_the_files_of_each(tmp_path: Path):
    as_file(tmp_path, "jsonl", RECORDS["text"])
    write(tmp_path / "notes.txt", "a text")
    with pytest.raises(DataError, match=r"1 file of records \(a.jsonl\) and 1 file of text \(notes.txt\)"):
        open_corpus(str(tmp_path))


def test_the_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path):
    as_file(tmp_path, "jsonl", RECORDS["text"])
    write(tmp_path / "README.md", "about the records")
    write(tmp_path / ".hidden", "")
    files = folder_files(str(tmp_path))
    assert files is not None
    assert [[path.name for path in each] for each in files] == [["a.jsonl"], ["README.md"]]
    assert folder_files(str(tmp_path / "a.jsonl")) is None
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "b.txt", "a text")
    write(tmp_path / "texts" / "c.pdf", "no text")
    files = folder_files(str(tmp_path / "texts"))
    assert files is not None
    assert [[path.name for path in each] for each in files] == [["b.txt"], ["c.pdf"]]


def test_only_what_can_be_read_is_suggested_for_a_missing_corpus(tmp_path: Path):
    (tmp_path / "corpora").mkdir()
    write(tmp_path / "corpus.pdf", "no text")
    with pytest.raises(DataError) as refused:
        open_corpus(str(tmp_path / "corpus.txt"))
    assert "Did you mean" not in str(refused.value)
    write(tmp_path / "corpora" / "a.txt", "a text")
    with pytest.raises(DataError, match="Did you mean 'corpora'"):
        open_corpus(str(tmp_path / "corpora.txt"))
