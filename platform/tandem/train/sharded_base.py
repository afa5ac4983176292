"""A base model that no rank holds whole: made empty, laid over the mesh, and filled by each rank from its slices of the files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tandem.checkpoint.source import Source
from tandem.config import TrainConfig
from tandem.config.layout import ModelShape, layers_known
from tandem.errors import ConfigError
from tandem.train.canonical import canonical, settle


def empty_base(config: TrainConfig, base: Path) -> nn.Module | None:
    """The model in `base` without its weights (they are on the meta device), to be filled by `fill` once it is laid out.

    None where each rank has to read all of it: with adapters, DeepSpeed or float8, of another family, or on one rank.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    parallel = config.parallel
    if parallel.strategy != "fsdp2" or parallel.workers == 1 or config.lora or config.precision == "float8":
        return None
    try:
        of = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.base {base} cannot be loaded: {error}") from error
    if not layers_known(ModelShape.read(of.to_dict()), config):
        return None
    with _without_memory():
        model: Any = AutoModelForCausalLM.from_config(of, dtype=torch.float32)
    if Source(base).lacks(name for name, _ in model.named_parameters()):
        return None
    if (base / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(base)
    made: nn.Module = model.eval()
    return made


@torch.no_grad()
def fill(model: nn.Module, base: Path) -> None:
    """Read this rank's part of the weights of a model that is laid out. `model`: the transformers model, as this rank has it."""
    source = Source(base)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, part in canonical(model, parameters).items():
        for offsets, held in part.boxes.items():
            held.copy_(source.read(name, offsets, held.shape))
    settle(model, parameters)


def is_empty(model: nn.Module) -> bool:
    """Whether a model waits for its weights."""
    return any(p.is_meta for p in model.parameters())


def make_room(stage: nn.Module, device: torch.device) -> None:
    """Give the parameters of an empty stage, which is sharded by now, memory on `device`; buffers keep what they hold."""
    buffers = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    stage.to_empty(device=device)
    for name, buffer in stage.named_buffers():
        buffer.copy_(buffers[name])


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
