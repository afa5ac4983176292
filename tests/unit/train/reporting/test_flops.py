"""FLOPs of a token, and peak FLOP/s of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tandem.config import LoraConfig
from tandem.train.adapters.lora import add_adapters
from tandem.train.reporting.flops import MfuMeter, active_parameters, flops_per_token, measured_flops, peak_flops

SMALL = {
    "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24,
}  # fmt: skip


def sizes(model: torch.nn.Module) -> list[tuple[str, int]]:
    return [(name, parameter.numel()) for name, parameter in model.named_parameters()]


def test_flops_per_token_of_palm_540b_match_its_paper():
    # 118 layers, 48 heads of 256, rows of 2048: 6 x 540.35e9 + 12 x 118 x 12288 x 2048.
    cost = flops_per_token(
        active_parameters=540_350_000_000,
        trained_parameters=540_350_000_000,
        num_layers=118,
        attention_width=48 * 256,
        sequence_length=2048,
    )
    assert cost == pytest.approx(3.2777e12, rel=1e-4)
    # Table 3: 238,300 tokens/s on 6,144 TPU v4 chips of 275 TFLOP/s are 46.2 %.
    assert cost * 238.3e3 / 6144 / 275e12 == pytest.approx(0.462, abs=0.003)


def test_a_frozen_parameter_costs_two_thirds():
    full = {"num_layers": 0, "attention_width": 0, "sequence_length": 1, "active_parameters": 900}
    assert flops_per_token(**full, trained_parameters=900) == 5400
    assert flops_per_token(**full, trained_parameters=0) == 3600


def test_an_embedding_counts_only_if_it_is_tied_to_the_output():
    tied = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    untied = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=False))
    total = sum(p.numel() for p in tied.parameters())
    assert active_parameters(sizes(tied), tied.config) == total
    assert sum(p.numel() for p in untied.parameters()) == total + 1600
    assert active_parameters(sizes(untied), untied.config) == total


def test_only_the_selected_experts_of_a_token_count():
    shape = {
        **SMALL,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "tie_word_embeddings": True,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    total = sum(p.numel() for p in model.parameters())
    experts = 3 * 8 * 3 * 16 * 12  # layers x experts x matrices x hidden x inner
    assert active_parameters(sizes(model), model.config) == total - experts * 6 // 8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),
        ("Some GPU 5000", None),
    ],
)
def test_peak_flops_are_found_by_the_full_device_name(name: str, peak: float | None):
    assert peak_flops(name) == peak


def test_flops_of_a_cpu_are_measured():
    assert measured_flops(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 0


def test_the_meter_reports_mfu_of_all_workers_and_memory_in_bytes():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    meter = MfuMeter.of(model, device=torch.device("cpu"), workers=2, sequence_length=32, precision="float32")
    total = sum(p.numel() for p in model.parameters())
    assert meter.token_flops == 6 * total + 12 * 3 * 32 * 32  # 4 heads of 8 are 32 wide
    read = meter.read(meter.peak / meter.token_flops / 4)
    assert read.mfu == pytest.approx(0.25)
    assert 2**26 < read.memory_bytes < 2**40, "bytes, not KiB: this process has imported PyTorch"


def test_an_adapters_frozen_base_costs_four_operations_a_parameter():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    base = sum(p.numel() for p in model.parameters())
    adapted = add_adapters(model, LoraConfig(rank=2), base_id="base", seed=0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    meter = MfuMeter.of(adapted, device=torch.device("cpu"), workers=1, sequence_length=32, precision="float32")
    assert meter.token_flops == 4 * base + 6 * trained + 12 * 3 * 32 * 32


def test_the_text_config_of_a_multimodal_config_is_used():
    inner = SimpleNamespace(tie_word_embeddings=True, num_experts=None)
    outer = SimpleNamespace(get_text_config=lambda: inner)
    assert active_parameters([("model.embed_tokens.weight", 7)], outer) == 7
