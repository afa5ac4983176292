"""One process, DDP and FSDP2 train alike; checkpoints resume exactly; adapters are sharded before they train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.data.packing import pack
from tandem.data.tokenize import TextEncoder, train_tokenizer
from tandem.settings import child_environment


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one process and two processes gave for every case of train_world.py."""
    folder = tmp_path_factory.mktemp("world")
    texts = [f"Line {n}: the quick brown fox jumps over {n * 7 % 13} lazy dogs." for n in range(60)]
    train_tokenizer(texts, folder / "tokenizer", vocab_size=300)
    encoder = TextEncoder(str(folder / "tokenizer"))
    np.save(folder / "rows.npy", pack(encoder.texts(texts), 32, encoder.pad_id, split=True))
    script = Path(__file__).with_name("train_world.py")
    for size in (1, 2):
        running = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder), str(rank), str(size)],
                env=child_environment({"OMP_NUM_THREADS": "1"}),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        for process in running:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    return folder


def results(world: Path, size: int, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((world / f"results-{size}-{rank}.json").read_text()))


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "accumulated", "ddp accumulated"])
def test_two_workers_have_the_losses_of_one(world: Path, case: str):
    alone = results(world, 1)["fsdp2"]
    assert alone[-1] < alone[0] - 0.5
    assert results(world, 2)[case] == pytest.approx(alone, abs=1e-5)
    assert results(world, 1)[case] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("case", ["compiled", "compiled, cut", "compiled, recomputed"])
def test_compiled_layers_have_the_same_losses(world: Path, case: str):
    assert results(world, 2)[case] == pytest.approx(results(world, 1)["fsdp2"], abs=1e-4)


@pytest.mark.parametrize("case", ["lora ddp", "lora fsdp2"])
def test_adapters_train_alike_on_one_and_two_workers(world: Path, case: str):
    alone = results(world, 1)["lora fsdp2"]
    assert alone[-1] < alone[0]
    assert results(world, 2)[case] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("case", "undisturbed"), [("resumed", "fsdp2"), ("resumed ddp", "ddp"), ("resumed lora", "lora fsdp2")]
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(world: Path, case: str, undisturbed: str, size: int):
    found = results(world, size)
    assert found[case]["losses"] == pytest.approx(found[undisturbed], abs=1e-6)
    assert found[case]["saved"] == ["step-00000003", "step-00000006"]


def test_every_rank_reports_the_same_losses(world: Path):
    assert results(world, 2, 0)["fsdp2"] == results(world, 2, 1)["fsdp2"]


def test_a_lora_checkpoint_holds_only_adapters(world: Path):
    from torch.distributed.checkpoint import FileSystemReader

    held = FileSystemReader(world / "resume-fsdp2-True-2" / "step-00000006").read_metadata().state_dict_metadata
    parameters = [name for name in held if name.startswith("model.")]
    assert parameters and all("lora_" in name for name in parameters)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_raises_on_every_rank_and_the_previous_checkpoint_stays_intact(world: Path, rank: int):
    found = results(world, 2, rank)["full disk"]
    assert "A checkpoint could not be written" in found["said"] and "MiB free" in found["said"]
    assert found["step"] == 1


@pytest.mark.parametrize("case", ["fsdp2-False-1", "fsdp2-False-2", "ddp-False-2"])
def test_an_export_loads_in_transformers_with_the_trained_loss(world: Path, case: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(world / f"export-{case}", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.architectures == ["LlamaForCausalLM"] and model.dtype == torch.float32
    reference = AutoModelForCausalLM.from_pretrained(world / "export-fsdp2-False-1")
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=name)
    tokenizer = AutoTokenizer.from_pretrained(world / f"export-{case}")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("size", [1, 2])
def test_an_adapter_export_loads_in_peft(world: Path, size: int):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = world / f"export-fsdp2-True-{size}"
    weights = load_file(folder / "adapter_model.safetensors")
    reference = load_file(world / "export-fsdp2-True-1" / "adapter_model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[name], atol=1e-5, rtol=1e-4, msg=name)
    base = AutoModelForCausalLM.from_pretrained(world / "export-fsdp2-False-1")
    ids = torch.arange(5, 15)[None]
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "b@1"
    assert not torch.equal(adapted(input_ids=ids).logits, before)
