"""Export of trained weights: a Hugging Face model folder or a peft adapter, in safetensors, published atomically.

Tensors are streamed from the ranks that have their parts into files, one at a time: no rank holds the model.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tandem.checkpoint.tensors import (
    MAX_FILE_BYTES,
    Convert,
    ExportTensor,
    index_tensors,
    single_file,
    split_into_files,
    write,
)
from tandem.errors import StorageError, TandemError
from tandem.storage import disk_errors, publish_folder


def export(
    model: nn.Module,
    weights: Sequence[ExportTensor],
    target: Path,
    *,
    extra_files: Iterable[Path] = (),
    file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights of a transformers or peft `model` to `target`, replacing what is there. Every rank calls it.

    `weights`: this rank's part of them, by the plain model's names. A peft model becomes an adapter folder, any other a folder
    that AutoModelForCausalLM and vLLM load, with copies of the files in `extra_files`, such as the tokenizer's. `model` itself
    may be split or sharded. Raises StorageError, on every rank, if the disk is full.
    """
    adapter = getattr(model, "peft_config", None) is not None
    table = index_tensors(weights)
    with _published_by_rank0(target) as staging:
        if adapter:
            convert: Convert = _adapter_name_converter(model)
            files = single_file(table, convert, "adapter_model.safetensors")
        else:
            shell = _meta_model(model)
            convert = _hub_name_converter(shell)
            files = split_into_files(table, convert, file_bytes)
        problem: str | None = None
        try:
            with disk_errors("exporting", target):
                write(staging, files, weights, table, convert)
        except (StorageError, OSError) as error:
            problem = str(error)
        _raise_on_all_ranks(problem)
        if _rank() != 0:
            return
        if adapter:
            _write_adapter_config(model, staging)
            return
        shell.config.save_pretrained(staging)
        generation: Any = model.generation_config
        if generation is not None:
            generation.save_pretrained(staging)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(file.bytes for file in files)},
                "weight_map": {name: file.name for file in files for name in file.tensors},
            }
            (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path in extra_files:
            shutil.copyfile(path, staging / path.name)


def export_tensors(model: nn.Module) -> list[ExportTensor]:
    """The weights of a model that is complete on this rank: a peft model's trained ones, or all of any other model."""
    adapter = getattr(model, "peft_config", None) is not None
    tied_names = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(
        model.named_parameters()
    ).keys()
    return [
        ExportTensor.of(name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied_names and (tensor.requires_grad or not adapter)
    ]


@contextlib.contextmanager
def _published_by_rank0(target: Path) -> Iterator[Path]:
    """A folder that all ranks write to in a `with` block, and rank 0 publishes at its end; an error is raised on all ranks."""
    folder_and_problem: list[str | None] = [None, None]
    stack = contextlib.ExitStack()
    if _rank() == 0:
        try:
            folder_and_problem[0] = str(stack.enter_context(publish_folder(target, replace=True)))
        except (TandemError, OSError) as error:
            folder_and_problem[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(folder_and_problem, src=0)
    folder, problem = folder_and_problem
    if folder is None:
        raise StorageError(str(problem))
    try:
        with stack:
            yield Path(folder)
    except (TandemError, OSError) as error:
        problem = str(error)
    _raise_on_all_ranks(problem)


def _raise_on_all_ranks(problem: str | None) -> None:
    problems: list[str | None] = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for rank_problem in problems:
        if rank_problem is not None:
            raise StorageError(rank_problem)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _meta_model(model: Any) -> Any:
    """A model of the same class on the meta device, which knows the file names of all weights; the trained one may be split."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return type(model)(config)


def _hub_name_converter(shell: Any) -> Convert:
    from transformers.core_model_loading import revert_weight_conversion

    # transformers stacks the experts of a mixture when it loads them; files, and vLLM, have them one by one.
    return lambda tensors: dict(revert_weight_conversion(shell, tensors))


def _adapter_name_converter(model: Any) -> Convert:
    from peft import get_peft_model_state_dict

    return lambda tensors: dict(get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False))


def _write_adapter_config(model: Any, folder: Path) -> None:
    config = model.peft_config["default"]
    previous, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = previous
    # peft writes sets in any order: sorted, equal adapters are equal files.
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(_sort_target_modules(json.loads(path.read_text())), indent=2, sort_keys=True))


def _sort_target_modules(config: dict[str, Any]) -> dict[str, Any]:
    target_modules = config.get("target_modules")
    return {**config, "target_modules": sorted(target_modules)} if isinstance(target_modules, list) else config
