"""A base model that no rank holds whole: made empty, laid over the mesh, and filled by each rank from its slices of the files.

Adapters are put in between, by whoever makes them: the empty model has addresses for its weights, but no memory behind them.
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
from tandem.train.parallel.canonical import canonical, persistent_buffers, sync_tied
from tandem.train.parallel.model import ParallelModel
from tandem.train.stage import TransformersForward


def build_empty_model(config: TrainConfig, base: Path) -> nn.Module | None:
    """The model in `base` without its weights. Before it is laid out, `to_meta` of them; afterwards, `load_weights` them in.

    None where each rank has to read all of it: with DoRA, 4 bits, DeepSpeed or float8, on one rank, from quantized files, or of a
    family whose files have other names than its model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    parallel = config.parallel
    reads = config.lora is not None and (config.lora.dora or config.lora.quantize is not None)
    if parallel.strategy != "fsdp2" or parallel.workers == 1 or config.precision == "float8" or reads:
        return None
    try:
        of = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.base {base} cannot be loaded: {error}") from error
    if getattr(of, "quantization_config", None) is not None:
        return None
    with _without_memory():
        model: Any = AutoModelForCausalLM.from_config(of, dtype=torch.float32)
    if SafetensorsReader(base).lacks({name: tensor.shape for name, tensor in _in_file(model).items()}):
        return None
    if (base / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(base)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # What was never written to takes no memory.
    made: nn.Module = model.to_empty(device="cpu").eval()
    _restore(made, buffers)
    return made


def to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Put the parameters of an empty model on the meta device, to be laid out; returns those of its adapters, which are real."""
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    gone: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # What is tied stays so.
                without = gone.setdefault(
                    parameter, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                )
                module._parameters[name] = without
    return adapters


@torch.no_grad()
def load_weights(model: ParallelModel, base: Path, adapters: Mapping[str, Tensor], device: torch.device) -> None:
    """Read this rank's part of the weights of a model that is laid out, and take its part of `adapters`.

    Raises LayoutError, on every rank, if it is one that does not keep documents apart.
    """
    source = SafetensorsReader(base)
    held_here = _in_file(model.whole)
    for name, part in canonical(model.whole, held_here).items():
        for offsets, held in part.chunks.items():
            if name in adapters:
                where = tuple(slice(at, at + size) for at, size in zip(offsets, held.shape, strict=True))
                held.copy_(adapters[name][where])
            else:
                held.copy_(source.read(_in_files(name), offsets, held.shape))
    sync_tied(model.whole, held_here)
    for module in model.modules():
        if isinstance(module, TransformersForward):
            module.check_documents(device)


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model waits for its weights."""
    return any(p.is_meta for p in model.parameters())


def allocate_parameters(stage: nn.Module, device: torch.device) -> None:
    """Give the parameters of an empty stage, which is sharded by now, memory on `device`; buffers keep what they hold."""
    buffers = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    stage.to_empty(device=device)
    _restore(stage, buffers)


def _restore(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def _in_file(model: nn.Module) -> dict[str, Tensor]:
    """What a model reads from files."""
    return {**dict(model.named_parameters()), **dict(persistent_buffers(model))}


def _in_files(name: str) -> str:
    """A parameter's name without what peft has put around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Inside, modules that are made have parameters without content. Buffers are real: no file holds a rotary embedding."""
    register: Any = nn.Module.register_parameter

    def without(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    setattr(nn.Module, "register_parameter", without)  # noqa: B010 - mypy takes no assignment to a method
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", register)  # noqa: B010
