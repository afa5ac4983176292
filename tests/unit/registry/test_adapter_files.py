"""Adapters that cannot be served are refused by their headers, each with its reason."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_folders import HIDDEN, WIDTH, Q, small_adapter, small_model

from tandem.errors import AdapterError, RegistryError
from tandem.registry.adapter_files import adapter_digest, check_adapter, is_unchanged

A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
GOOD = {A: (16, HIDDEN), B: (WIDTH, 16)}


@pytest.fixture
def base(tmp_path):
    return small_model(tmp_path / "base")


def test_a_sound_adapter_tells_its_rank_and_layers(tmp_path, base):
    files = check_adapter(small_adapter(tmp_path / "red", rank=4), base)
    assert (files.rank, files.dora, len(files.layers)) == (4, False, 2) and Q in files.layers
    assert files.size_bytes > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "r is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": None}, "target_modules is None"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"tensors": {}}, "holds no LoRA matrix"),
        ({"tensors": {A: (16, HIDDEN)}}, "has lora_A; it must have one A and one B"),
        ({"tensors": GOOD | {"weight": (2, 2)}}, "weight, which is no LoRA matrix"),
        ({"tensors": GOOD | {f"{Q}.lora_magnitude_vector": (6,)}}, "no LoRA matrix"),
        ({"tensors": {A: (8, HIDDEN), B: (WIDTH, 8)}}, r"with rank 16 they are \(16, in\) and \(out, 16\)"),
        ({"tensors": {A: (16, HIDDEN, 1), B: (WIDTH, 16)}}, "has 3 dimensions"),
        ({"dtype": np.int8}, "of type I8"),
        ({"tensors": {A: (16, 5), B: (WIDTH, 16)}}, "from 5 to 6, and its base has it from 4 to 6"),
        ({"tensors": {A: (16, HIDDEN), B: (7, 16)}}, "from 4 to 7, and its base has it from 4 to 6"),
        (
            {"tensors": {name.replace("layers.0", "layers.7"): shape for name, shape in GOOD.items()}},
            "adapts model.layers.7.self_attn.q_proj, and its base has no such layer",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(tmp_path, base, options, message):
    with pytest.raises(AdapterError, match=message):
        check_adapter(small_adapter(tmp_path / "red", **options), base)


def test_a_pickle_is_refused_whatever_it_is_called(tmp_path, base):
    folder = small_adapter(tmp_path / "red")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a pickle"):
        check_adapter(folder, base)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(AdapterError, match="not a safetensors file"):
        check_adapter(folder, base)


@pytest.mark.parametrize(
    "header",
    [
        lambda whole: struct.pack("<Q", 2**63) + whole[8:],
        lambda whole: struct.pack("<Q", len(whole)) + whole[8:],
        lambda whole: whole[:-4],
        lambda whole: whole[:6],
        lambda whole: b"",
        lambda whole: whole.replace(b'"data_offsets":[0', b'"data_offsets":[8', 1),
        lambda whole: whole.replace(b'"data_offsets":[0', b'"data_offsets":[-', 1),
        lambda whole: whole.replace(b'"shape":[16,4]', b'"shape":[9,999]', 1),
        lambda whole: whole.replace(b'"F32"', b'"F99"', 1),
    ],
)
def test_lengths_and_offsets_that_cannot_be_are_refused(tmp_path, header):
    folder = small_adapter(tmp_path / "red")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(header(whole))
    assert file.read_bytes() != whole
    with pytest.raises(AdapterError, match="not a safetensors file"):
        check_adapter(folder)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_sound_and_never_anything_else(tmp_path, base, data):
    folder = small_adapter(tmp_path / "red")
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(bytes(content))
    try:
        check_adapter(folder, base)
    except AdapterError as error:
        assert str(folder) in str(error) or "adapter" in str(error)


def test_a_layer_of_any_prefix_is_found_and_a_packed_weight_is_not_compared(tmp_path):
    folder = small_adapter(tmp_path / "red", tensors=GOOD)
    for layer in ("layers.0.self_attn.q_proj", f"language_model.{Q}", "model.language_model.layers.0.self_attn.q_proj"):
        base = tmp_path / layer
        base.mkdir()
        save_file({f"{layer}.weight": np.zeros((WIDTH, HIDDEN + 1), np.float32)}, base / "model.safetensors")
        with pytest.raises(AdapterError, match="its base has it from 5 to 6"):
            check_adapter(folder, base)
        save_file({f"{layer}.qweight": np.zeros((1, 9), np.int32)}, base / "model.safetensors")
        assert check_adapter(folder, base).rank == 16


def test_embeddings_and_tied_heads_are_compared_by_their_own_rule(tmp_path, base):
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    head = "base_model.model.lm_head.lora_"
    good = {
        f"{embedding}A": (16, 8),
        f"{embedding}B": (HIDDEN, 16),
        f"{head}A.weight": (16, HIDDEN),
        f"{head}B.weight": (8, 16),
    }
    assert len(check_adapter(small_adapter(tmp_path / "red", tensors=good), base).layers) == 2
    with pytest.raises(AdapterError, match="embed_tokens"):
        check_adapter(small_adapter(tmp_path / "red", tensors=good | {f"{embedding}A": (16, 9)}), base)


def test_a_base_that_is_not_known_is_not_compared_with(tmp_path):
    folder = small_adapter(tmp_path / "red")
    assert check_adapter(folder).rank == check_adapter(folder, tmp_path / "nothing").rank == 16


def test_the_digest_is_of_the_two_files_only_and_older_ones_still_count(tmp_path):
    from tandem.ids import folder_digest

    folder = small_adapter(tmp_path / "red")
    before = adapter_digest(folder)
    assert before == folder_digest(folder)
    (folder / "README.md").write_text("made by peft")
    assert adapter_digest(folder) == before
    assert is_unchanged(folder, before) and is_unchanged(folder, folder_digest(folder))
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"lora_alpha": 1}))
    assert not is_unchanged(folder, before)


def test_a_bad_adapter_is_not_registered(registry, model_folder, adapter_folder):
    registry.register_model("base", model_folder())
    with pytest.raises(RegistryError, match="its base has it"):
        registry.register_adapter("red", adapter_folder(tensors={A: (16, 9), B: (WIDTH, 16)}), base="base")
    assert registry.list("adapter") == [] and registry.revision() == 1


def test_checking_imports_neither_torch_nor_transformers(tmp_path, base):
    code = (
        "import sys; from pathlib import Path; from tandem.registry.adapter_files import check_adapter; "
        "check_adapter(Path(sys.argv[1]), Path(sys.argv[2])); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    args = [sys.executable, "-c", code, str(small_adapter(tmp_path / "red")), str(base)]
    assert subprocess.run(args, capture_output=True, text=True, check=True).stdout.strip() == "[]"
