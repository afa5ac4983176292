"""Sharded loading of a base model: built without weights, distributed, then loaded by each rank from its slices of the files.

No rank holds the whole model. Adapters are added before it is distributed: until then parameters have virtual memory that was
never written, and takes no RAM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tandem.checkpoint.safetensors_reader import SafetensorsReader
from tandem.config import TrainConfig
from tandem.errors import ConfigError
from tandem.train.model.stage import TransformersForward
from tandem.train.parallel.canonical import canonical, persistent_buffers, sync_tied
from tandem.train.parallel.model import ParallelModel


def build_empty_model(config: TrainConfig, base: Path) -> nn.Module | None:
    """The model in `base` without its weights. Call `to_meta` before it is distributed, and `load_weights` afterwards.

    None if each rank has to read all weights: with DoRA, 4 bits, DeepSpeed or float8, on one rank, from quantized files, or for a
    family whose files have other names than its model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    parallel = config.parallel
    reads_all_weights = config.lora is not None and (config.lora.dora or config.lora.quantize is not None)
    if parallel.strategy != "fsdp2" or parallel.workers == 1 or config.precision == "float8" or reads_all_weights:
        return None
    try:
        model_config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.base {base} cannot be loaded: {error}") from error
    if getattr(model_config, "quantization_config", None) is not None:
        return None
    with _without_memory():
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    if SafetensorsReader(base).missing({name: tensor.shape for name, tensor in _tensors_in_files(model).items()}):
        return None
    if (base / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(base)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # Memory that is never written takes no RAM.
    empty_model: nn.Module = model.to_empty(device="cpu").eval()
    _restore(empty_model, buffers)
    return empty_model


def to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Move the parameters of an empty model to the meta device, before it is distributed; returns those of its adapters."""
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    meta_parameters: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # Tied parameters stay tied.
                meta_parameter = meta_parameters.setdefault(
                    parameter, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                )
                module._parameters[name] = meta_parameter
    return adapters


@torch.no_grad()
def load_weights(model: ParallelModel, base: Path, adapters: Mapping[str, Tensor], device: torch.device) -> None:
    """Load this rank's part of the weights of a distributed model from `base`, and its part of `adapters`.

    Raises LayoutError, on every rank, if the model does not separate the documents of a row.
    """
    source = SafetensorsReader(base)
    model_tensors = _tensors_in_files(model.whole)
    for name, part in canonical(model.whole, model_tensors).items():
        for offsets, chunk in part.chunks.items():
            if name in adapters:
                slices = tuple(slice(at, at + size) for at, size in zip(offsets, chunk.shape, strict=True))
                chunk.copy_(adapters[name][slices])
            else:
                chunk.copy_(source.read(_file_name(name), offsets, chunk.shape))
    sync_tied(model.whole, model_tensors)
    for module in model.modules():
        if isinstance(module, TransformersForward):
            module.check_documents(device)


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model has parameters on the meta device."""
    return any(p.is_meta for p in model.parameters())


def allocate_parameters(stage: nn.Module, device: torch.device) -> None:
    """Allocate the parameters of a sharded stage on `device`, uninitialized; buffers keep their values."""
    buffers = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    stage.to_empty(device=device)
    _restore(stage, buffers)


def _restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _tensors_in_files(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that its files hold."""
    return {**dict(model.named_parameters()), **dict(persistent_buffers(model))}


def _file_name(name: str) -> str:
    """The name of a parameter without peft's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Modules built in a `with` block have parameters on the meta device. Buffers are real: no file holds rotary embeddings."""
    register: Any = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    setattr(nn.Module, "register_parameter", register_on_meta)  # noqa: B010 - mypy takes no assignment to a method
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010
