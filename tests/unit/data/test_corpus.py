"""Corpora read the same each time, and name the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.data import stdlib
from tandem.data.corpus import Pair, Preference, Text, cut, open_corpus
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
    assert sum(t.size for t in texts) > 5_000_000
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
    with pytest.raises(DataError, match="holds text, not pairs"):
        open_corpus(write(tmp_path / "a.txt", "words"), "pairs")


def test_a_small_text_file_gives_many_samples_and_loses_nothing(tmp_path: Path):
    text = "".join(f"Paragraph {n} says something.\n\n" for n in range(500))
    samples = list(open_corpus(write(tmp_path / "a.txt", text)).samples())
    assert len(samples) > 16
    assert "".join(s.text for s in samples if isinstance(s, Text)) == text


def test_cutting_keeps_long_lines_whole():
    assert list(cut("a" * 50 + "\n" + "b", 10)) == ["a" * 50 + "\n", "b"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "sub" / "c.py", "third")
    write(tmp_path / "image.png", b"\x89PNG")
    assert [s.text for s in open_corpus(str(tmp_path)).samples() if isinstance(s, Text)] == ["first", "second", "third"]
