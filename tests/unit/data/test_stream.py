"""What a reading task makes of shards, without Ray."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tandem.data.index import Kind
from tandem.data.packing import pack, pack_preferences
from tandem.data.stream import PackSpec
from tandem.data.tokenize import TextEncoder, train_tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words to learn from"] * 5, folder, vocab_size=280)
    return TextEncoder(str(folder))


def packed(encoder: TextEncoder, kind: Kind, **columns: Any) -> Any:
    return PackSpec(encoder=encoder, kind=kind, length=LENGTH, loss_on_all=False)(columns)["row"]


def test_rows_never_mix_shards(encoder: TextEncoder):
    texts = ["some words", "to learn", "from words"]
    rows = packed(encoder, "text", path=["a", "b", "a"], txt=[text.encode() for text in texts])
    apart = [pack(encoder.texts(part), LENGTH, encoder.pad_id, split=True) for part in (texts[::2], texts[1:2])]
    np.testing.assert_array_equal(rows, np.concatenate(apart))


def test_preferences_become_rows_of_both_sides(encoder: TextEncoder):
    found = [("words?", f"learn {n}", "from") for n in range(3)]
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), each, strict=True))).encode() for each in found]
    rows = packed(encoder, "preferences", path=["a"] * 3, json=lines)
    np.testing.assert_array_equal(rows, pack_preferences(encoder.preferences(found), LENGTH, encoder.pad_id))
    assert rows.shape[1] == 6 and len(rows)


@pytest.mark.parametrize(("kind", "width"), [("text", 3), ("pairs", 3), ("preferences", 6)])
def test_no_shard_gives_no_rows_of_the_right_shape(encoder: TextEncoder, kind: Kind, width: int):
    assert packed(encoder, kind, path=[]).shape == (0, width, LENGTH)
