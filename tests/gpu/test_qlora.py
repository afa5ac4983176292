"""QLoRA on a GPU: adapters learn on a base in 4 bits, sharded or not, and are exported as any others."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tandem.checkpoint.export import export
from tandem.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, ParallelismConfig, TrainConfig
from tandem.train.adapters.lora import add_adapters
from tandem.train.adapters.quantize import load_nf4
from tandem.train.loop import LoopState, train
from tandem.train.model.build import count_parameters
from tandem.train.optimizer import build_optimizer
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.parallelize import parallelize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]
DEVICE, BACKEND = "cuda", "nccl"


class Same:
    """The same rows at every step."""

    def take(self, count: int) -> Any:
        rows = np.zeros((count, 3, 32), np.int32)
        rows[:, 0] = rows[:, 1] = np.arange(5, 37)
        rows[:, 2] = np.arange(32)
        return rows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(
        tmp_path / "base"
    )
    return tmp_path / "base"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(BACKEND, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_learn_on_a_base_in_4_bits(
    world: None, base: Path, tmp_path: Path, dora: bool, precision: str
) -> None:
    config = TrainConfig(
        name="n",
        data=DataConfig(path="x", sequence_length=32),
        model=ModelConfig(base=str(base)),
        lora=LoraConfig(rank=8, dora=dora, quantize="nf4"),
        parallel=ParallelismConfig(gpus_per_worker=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        precision=precision,
        steps=20,
        batch_size=2,
    )
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    model: Any = load_nf4(base, precision, device)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 14 and not any(p.requires_grad for p in packed)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert count_parameters(model)[0] == whole
    assert config.lora is not None
    model = add_adapters(model, config.lora, base_id="b", seed=0)
    before = [p.detach().clone() for p in packed]
    # In bfloat16 one process is laid out by FSDP2 too, which then holds the packed bytes.
    placed = parallelize(model, Degrees.of(config.parallel).mesh(DEVICE, 1), config, device)
    optimizer = build_optimizer(placed, config.optimizer, device)
    losses: list[float] = []
    train(
        placed, optimizer, Same(), config, LoopState(), report=lambda step: losses.append(step.loss),
        save=lambda state: None, device=device,
    )  # fmt: skip
    assert losses[-1] < losses[0] - 0.5
    held = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters() if p.dtype == torch.uint8]
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True)), "the base stays as it is"
    export(placed.whole, placed.weights(), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
