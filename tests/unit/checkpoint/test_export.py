"""Tensors are written to files one at a time, and other libraries load the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tandem.checkpoint.export import export, export_tensors
from tandem.checkpoint.tensors import (
    ExportTensor,
    TensorIndex,
    header,
    index_tensors,
    single_file,
    split_into_files,
    write,
)
from tandem.errors import StorageError


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 96,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).eval()


def as_it_is(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_safetensors_reads_the_written_files(tmp_path: Path, dtype: torch.dtype):
    # Not contiguous, without elements, and without axes.
    tensors = {
        "a": torch.arange(6).view(2, 3).T.to(dtype),
        "b": torch.empty(0, 3, dtype=dtype),
        "c": torch.ones((), dtype=dtype),
    }
    held = [ExportTensor.of(name, tensor) for name, tensor in tensors.items()]
    table = index_tensors(held)
    write(tmp_path, single_file(table, as_it_is, "t.safetensors"), held, table, as_it_is)
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())


def test_a_header_keeps_tensors_aligned():
    assert all(len(header({"n" * length: torch.ones(3)})) % 8 == 0 for length in range(1, 9))


def test_each_file_is_owned_by_a_rank_that_has_its_tensors():
    empty = {name: torch.empty(10, device="meta") for name in "abcdef"}
    table = TensorIndex(empty, {name: [0, 1] if name < "d" else [2, 3] for name in empty})
    files = split_into_files(table, as_it_is, file_bytes=80)
    assert [(file.owner, file.sources) for file in files] == [(0, ["a", "b"]), (1, ["c", "d"]), (2, ["e", "f"])]
    assert files[0].name == "model-00001-of-00003.safetensors"
    # A tensor that is larger than a file gets one of its own.
    assert [file.sources for file in split_into_files(table, as_it_is, file_bytes=1)] == [[name] for name in empty]


def test_one_tensor_at_a_time_is_gathered(tmp_path: Path):
    alive, most = 0, 0

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> Tensor:
            nonlocal alive, most
            import weakref

            made = torch.ones(1000)
            alive, most = alive + 1, max(most, alive + 1)

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(made, gone)
            return made

    held = [ExportTensor(name=n, shape=(1000,), dtype=torch.float32, gather=Counted(n)) for n in "abcdef"]
    table = index_tensors(held)
    write(tmp_path, split_into_files(table, as_it_is, 8000), held, table, as_it_is)
    assert most <= 2, "the one that is written, and the next"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_model_in_many_files_loads_in_transformers(model: Any, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    export(model, export_tensors(model), tmp_path / "export", file_bytes=20_000)
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    names = {path.name for path in (tmp_path / "export").glob("*.safetensors")}
    assert len(names) > 2 and set(index["weight_map"].values()) == names
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_small_model_is_one_file_without_an_index(model: Any, tmp_path: Path):
    export(model, export_tensors(model), tmp_path / "export")
    assert not (tmp_path / "export" / "model.safetensors.index.json").exists()
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys(), "it is the embedding"  # noqa: SIM118 - not a mapping
        assert file.metadata() == {"format": "pt"}


def test_a_failed_export_keeps_the_previous_one(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tandem.checkpoint import tensors

    export(model, export_tensors(model), tmp_path / "export")
    before = (tmp_path / "export" / "model.safetensors").read_bytes()

    def full(tensor: Tensor) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "bytes_of", full)
    with pytest.raises(StorageError, match="disk is full"):
        export(model, export_tensors(model), tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
