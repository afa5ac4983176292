"""Streaming export of distributed tensors to safetensors files: gathered one at a time, each file written by one rank.

No rank ever has more than one full tensor. The header of a file holds the offsets of its tensors, so that it is written before
any of them is gathered (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_FILE_BYTES = 4 * 2**30
"""Size of the tensors in one file, at most, unless a single one is larger."""
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From tensors of the model to those of a file: other names, or several for one."""


@dataclass(frozen=True, kw_only=True)
class ExportTensor:
    """A tensor of which this rank has a part, or all."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    gather: Callable[[], Tensor]
    """Gathers it. All ranks that have the name call it, in the same order of names."""

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> ExportTensor:
        """A tensor that is complete on this rank."""
        return cls(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, gather=tensor.detach)


@dataclass(frozen=True)
class TensorIndex:
    """The tensors of all ranks."""

    meta: dict[str, Tensor]
    """Each tensor by name, in order, on the meta device."""
    holders: dict[str, list[int]]
    """Ranks that have a part of each tensor."""


@dataclass(kw_only=True)
class OutputFile:
    """A file of the export, which rank `owner` writes."""

    owner: int
    name: str = ""
    sources: list[str] = field(default_factory=list)
    """Names of the model's tensors in it, in order."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file, in order, on the meta device."""

    @property
    def bytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(map(size_of, self.tensors.values()))


def index_tensors(tensors: Iterable[ExportTensor]) -> TensorIndex:
    """The tensors of all ranks. Every rank calls it."""
    own_tensors = [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]
    tensors_by_rank: list[Any] = [own_tensors]
    if dist.is_initialized():
        tensors_by_rank = [None] * dist.get_world_size()
        dist.all_gather_object(tensors_by_rank, own_tensors)
    table = TensorIndex({}, {})
    for rank, rank_tensors in enumerate(tensors_by_rank):
        for name, shape, dtype in rank_tensors:
            table.meta.setdefault(name, torch.empty(shape, dtype=dtype, device="meta"))
            table.holders.setdefault(name, []).append(rank)
    return table


def single_file(table: TensorIndex, convert: Convert, name: str) -> list[OutputFile]:
    """One file with all tensors, written by rank 0."""
    file = OutputFile(owner=0, name=name)
    for source, empty in table.meta.items():
        file.sources.append(source)
        file.tensors |= convert({source: empty})
    return [file]


def split_into_files(table: TensorIndex, convert: Convert, file_bytes: int) -> list[OutputFile]:
    """Files of at most `file_bytes`, each written by a rank that has parts of its tensors; named as Hugging Face does."""
    files: list[OutputFile] = []
    files_of_rank: dict[int, int] = {}
    for source, empty in table.meta.items():
        converted = convert({source: empty})
        converted_bytes = sum(map(size_of, converted.values()))
        holders = table.holders[source]
        if not files or files[-1].bytes + converted_bytes > file_bytes:
            owner = min(holders, key=lambda rank: (files_of_rank.get(rank, 0), rank))
            files_of_rank[owner] = files_of_rank.get(owner, 0) + 1
            files.append(OutputFile(owner=owner))
        files[-1].sources.append(source)
        files[-1].tensors |= converted
    for number, file in enumerate(files, 1):
        file.name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
    return files


def write(
    folder: Path, files: Sequence[OutputFile], own_tensors: Iterable[ExportTensor], table: TensorIndex, convert: Convert
) -> None:
    """Write this rank's files. Every rank calls it; a rank whose disk is full still takes part in gathering."""
    owner = {source: file for file in files for source in file.sources}
    problem: Exception | None = None
    open_files: dict[str, Any] = {}
    try:
        for name, tensor in stream(own_tensors, table, {source: file.owner for source, file in owner.items()}):
            if tensor is None or problem is not None:
                continue
            file = owner[name]
            try:
                if file.name not in open_files:
                    open_files[file.name] = (folder / file.name).open("wb")
                    open_files[file.name].write(header(file.tensors))
                for converted in convert({name: tensor}).values():
                    open_files[file.name].write(bytes_of(converted))
            except OSError as error:
                problem = error
    finally:
        for stream_ in open_files.values():
            try:
                stream_.close()
            except OSError as error:
                problem = problem or error
    if problem is not None:
        raise problem


def stream(
    own_tensors: Iterable[ExportTensor], table: TensorIndex, owners: Mapping[str, int] | int
) -> Iterator[tuple[str, Tensor | None]]:
    """Each tensor in turn: gathered on the CPU of the rank that owns it, None on the others. Every rank iterates it."""
    tensor_by_name = {tensor.name: tensor for tensor in own_tensors}
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, empty in table.meta.items():
        owner = owners if isinstance(owners, int) else owners[name]
        holders = table.holders[name]
        full = tensor_by_name[name].gather() if name in tensor_by_name else None
        if owner not in holders:
            if rank == holders[0]:
                assert full is not None, "the first holder has gathered it"
                dist.send(full.contiguous(), dst=owner)
            elif rank == owner:
                full = torch.empty_like(empty, device=_device())
                dist.recv(full, src=holders[0])
        yield name, full.detach().cpu() if rank == owner and full is not None else None


def gather_on_rank0(own_tensors: Sequence[ExportTensor]) -> dict[str, Tensor]:
    """All tensors on rank 0 and none on the others, for small models."""
    return {name: tensor for name, tensor in stream(own_tensors, index_tensors(own_tensors), 0) if tensor is not None}


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a file with tensors of these shapes and types."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + size_of(tensor)
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def size_of(tensor: Tensor) -> int:
    """Size in bytes."""
    return math.prod(tensor.shape) * tensor.element_size()


def bytes_of(tensor: Tensor) -> Any:
    """The content of a tensor in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _device() -> torch.device:
    # NCCL communicates between GPUs only.
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
