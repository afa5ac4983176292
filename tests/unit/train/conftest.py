"""A tokenizer and a small model, for tests in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tandem.config import DataConfig, ModelConfig, TrainConfig
from tandem.data.tokenize import TextEncoder, train_tokenizer
from tandem.train.model.build import build_model
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.parallelize import parallelize

SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words to learn from"] * 5, folder, vocab_size=280)
    return TextEncoder(str(folder))


@pytest.fixture
def model(encoder: TextEncoder) -> torch.nn.Module:
    return build_model(SHAPE, None, encoder, seed=0).eval()


@pytest.fixture
def alone() -> Iterator[Callable[..., ParallelModel]]:
    """Lays a model over a mesh of this one process; changes to the config may be given."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = TrainConfig(name="t", data=DataConfig(path="p", sequence_length=16))

    def placed(model: torch.nn.Module, **changes: object) -> ParallelModel:
        mesh = Degrees().mesh("cpu", 1)
        return parallelize(model, mesh, replace(config, **changes), torch.device("cpu"))

    yield placed
    dist.destroy_process_group()
