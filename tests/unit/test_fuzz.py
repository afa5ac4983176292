"""Readers of bytes that others write: whatever they are given, they return or raise an error of their own."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.api.bounded_json import InvalidJsonError, TooManyValuesError, parse_object
from tandem.batch.input.plan import Position
from tandem.batch.input.rows import BadRowError, parse, read_row
from tandem.batch.input.sources import json_lines
from tandem.config import ServeConfig, TrainConfig
from tandem.config.load import load_yaml
from tandem.data.tar import READ_ERRORS, MemberError, decode_fields, foreign_samples
from tandem.errors import ConfigError
from tandem.gateway.dialect import dialect_of, rewrite_errors
from tandem.usage.records import UsageLabels
from tandem.usage.wire import counts_from_header, split_comment

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["models", "model", "gateway", "replicas", "data", "path", "steps", "lora", "name", "parallel"])


def tar(names: list[str], contents: list[bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in zip(names, contents, strict=False):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


NAMES = st.lists(st.sampled_from(["a.json", "a.txt", "b.json", "b.cls", "c.npy", "c.jsonl", "d"]), max_size=5)
DAMAGE = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8)


@given(NAMES, st.lists(st.binary(max_size=60), min_size=5, max_size=5), DAMAGE, st.integers(0, 10_000))
@QUICK
def test_a_damaged_tar_gives_samples_or_one_of_the_errors_of_reading(
    names: list[str], contents: list[bytes], damage: list[tuple[int, int]], length: int
) -> None:
    packed = bytearray(tar(names, contents))
    for place, value in damage:
        packed[place % len(packed)] = value
    try:
        for sample in foreign_samples(io.BytesIO(bytes(packed[:length]))):
            decode_fields(sample.fields)
    except (*READ_ERRORS, MemberError):
        pass


@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
@QUICK
def test_a_row_of_a_batch_is_a_request_or_a_bad_row(raw: bytes) -> None:
    for row in json_lines(io.BytesIO(raw + b"\n" + raw), Position()):
        try:
            read_row(parse(row.raw), {})
        except BadRowError:
            pass


@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
@QUICK
def test_a_body_is_an_object_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parse_object(raw), dict)
    except (InvalidJsonError, TooManyValuesError):
        pass


EVENTS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [b"data: ", b'data: {"error":', b"event: error\n", b"\n\n", b"[DONE]", b": 1 2 tandem-usage\n\n"]
        ),
        JSON.map(lambda value: json.dumps(value).encode()),
    ),
    max_size=6,
).map(b"".join)


@given(EVENTS, st.sampled_from(["/v1/completions", "/v1/messages", "/v1/responses"]))
@QUICK
def test_any_bytes_of_a_stream_pass(chunk: bytes, path: str) -> None:
    kept, counts = split_comment(chunk)
    assert chunk.startswith(kept) and (counts is not None or kept == chunk)
    rewritten = rewrite_errors(kept, dialect_of(path), "req_1", lambda message, model: message)
    assert b"error" in kept or rewritten == kept


@given(st.binary(max_size=80))
@QUICK
def test_headers_between_gateway_and_replica_are_read_or_ignored(value: bytes) -> None:
    labels = UsageLabels.from_header(value)
    assert labels is None or len(labels) == 5
    counts_from_header(value.decode("latin-1"))


def yaml_of(value: Any) -> str:
    return json.dumps(value)  # JSON is YAML


@given(st.one_of(st.text(max_size=120), st.dictionaries(KEYS, JSON, max_size=5).map(yaml_of)))
@QUICK
def test_a_config_is_read_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, errors="surrogatepass")
    for kind in (TrainConfig, ServeConfig):
        with contextlib.suppress(ConfigError):
            load_yaml(kind, file)
