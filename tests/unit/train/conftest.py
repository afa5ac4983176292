"""A tokenizer and a small model, for tests in one process."""

from __future__ import annotations

import pytest
import torch

from tandem.config import ModelConfig
from tandem.data.tokenize import TextEncoder, train_tokenizer
from tandem.train.model import build_model

SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words to learn from"] * 5, folder, vocab_size=280)
    return TextEncoder(str(folder))


@pytest.fixture
def model(encoder: TextEncoder) -> torch.nn.Module:
    return build_model(SHAPE, None, encoder, seed=0).eval()
