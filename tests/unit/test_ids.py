"""Digests, job ids, names and versions."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem import ids
from tandem.errors import ConfigError

names = st.from_regex(ids.NAME_PATTERN, fullmatch=True)


def test_equal_values_have_one_digest_whatever_their_order():
    assert ids.digest({"a": 1, "b": [1, {"x": None, "y": "é"}]}) == ids.digest(
        {"b": [1, {"y": "é", "x": None}], "a": 1}
    )
    assert ids.digest([1, 2]) != ids.digest([2, 1])
    assert ids.digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_the_same_submission_has_the_same_job_id():
    assert ids.job_id("sft", {"a": 1, "b": 2}) == ids.job_id("sft", {"b": 2, "a": 1})
    assert ids.job_id("sft", {"a": 1}) != ids.job_id("sft", {"a": 2})
    stem, _, tail = ids.job_id("my-sft", {}).rpartition("-")
    assert stem == "my-sft"
    assert len(tail) == 12


def test_a_folders_digest_follows_names_and_contents_only(tmp_path):
    def build(root, files):
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return ids.folder_digest(root)

    files = {"a": b"1", "sub/b": b"2"}
    first = build(tmp_path / "one", files)
    assert build(tmp_path / "two", dict(reversed(files.items()))) == first
    assert build(tmp_path / "three", {"a": b"1", "sub/b": b"3"}) != first
    assert build(tmp_path / "four", {"a": b"1", "sub/c": b"2"}) != first
    assert build(tmp_path / "five", {"a": b"12", "sub/b": b""}) != first
    (tmp_path / "one" / "empty").mkdir()
    assert ids.folder_digest(tmp_path / "one") == first


def test_a_job_of_a_fine_tuned_model_has_an_id_without_colons():
    assert ids.job_id("ft:base:red::7f", {}).startswith("ft-base-red--7f-")


def test_a_files_digest_is_its_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    assert ids.file_digest(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()


@pytest.mark.parametrize(
    "name", ["a", "Qwen3-0.6B", "0", "a.b_c-d", "x" * 96, "ft:base:red::7f", "ft:b:red:my-suffix:7f"]
)
def test_a_name_that_can_be_used_comes_back(name):
    assert ids.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "_a", "a b", "a/b", "a@1", "a\n", "é", "x" * 97, "..", "a\x00"])
def test_a_name_that_cannot_be_used_is_refused_by_what_it_names(name):
    with pytest.raises(ConfigError, match="adapter name .* cannot be used"):
        ids.check_name(name, "adapter name")


@given(names, st.integers(1, 10**9 - 1))
def test_a_version_splits_off_what_was_put_on(name, version):
    assert ids.split_version(ids.versioned(name, version)) == (name, version)
    assert ids.split_version(name) == (name, None)


@given(st.text())
def test_any_text_splits_without_an_error(text):
    stem, version = ids.split_version(text)
    assert version is None or version >= 0
    assert text.startswith(stem)


@pytest.mark.parametrize("name", ["a@", "a@x", "a@-1", "a@1.0", "a@²", "a@" + "9" * 5000])
def test_what_is_no_version_stays_a_part_of_the_name(name):
    assert ids.split_version(name) == (name, None)
