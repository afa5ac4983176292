"""Models under test: small, random, made on the spot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def write_model(folder: Path) -> None:
    """A random Llama of 3 million parameters with a BPE of Python's own sources."""
    code = """
import os, sys, sysconfig
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>"], show_progress=False)
files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
tokenizer.train([str(f) for f in files], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(sys.argv[1])
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    tie_word_embeddings=True)).save_pretrained(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
