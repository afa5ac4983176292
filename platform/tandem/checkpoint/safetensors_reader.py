"""Reader of a Hugging Face folder of safetensors files, by slices of the model's tensors.

Files hold the experts of a mixture one by one, where a model has them stacked: (E, 2I, H), gate above up, and (E, H, I). Files of
Mixtral have other names for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class SafetensorsReader:
    """The tensors of a folder, by name. Files stay open; only requested slices are read."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self._files: dict[Path, Any] = {}
        self._file_by_name: dict[str, Path] = {}
        if index.exists():
            self._file_by_name = {
                name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        elif (single := folder / "model.safetensors").exists():
            self._file_by_name = dict.fromkeys(self._open(single).keys(), single)

    def missing(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Names of the model's tensors, given by their shapes, that the files do not hold."""
        return [name for name, shape in shapes.items() if not self._is_in_files(name, tuple(shape))]

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A slice of a tensor of the model, in the type of the file."""
        match = _STACKED.fullmatch(name)
        if match is None or name in self._file_by_name:
            return self._slice(self._plain_name(name), offsets, sizes)
        prefix, kind = match.groups()
        experts = range(offsets[0], offsets[0] + sizes[0])
        return torch.stack([self._expert(prefix, kind, expert, offsets[1:], sizes[1:]) for expert in experts])

    def _expert(self, prefix: str, kind: str, expert: int, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        if kind == "down_proj":
            return self._slice(self._expert_name(prefix, expert, kind), offsets, sizes)
        slices = []
        first, last = offsets[0], offsets[0] + sizes[0]
        for position, projection in enumerate(("gate_proj", "up_proj")):
            name = self._expert_name(prefix, expert, projection)
            width = self._shape(name)[0]
            start, stop = max(first - position * width, 0), min(last - position * width, width)
            if start < stop:
                slices.append(self._slice(name, (start, offsets[1]), (stop - start, sizes[1])))
        return torch.cat(slices)

    def _slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        slices = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
        tensor: Tensor = (
            self._open_file_with(name).get_slice(name)[slices]
            if slices
            else self._open_file_with(name).get_tensor(name)
        )
        return tensor

    def _is_in_files(self, name: str, shape: tuple[int, ...]) -> bool:
        parts = self._names_in_files(name)
        if not set(parts) <= self._file_by_name.keys():
            return False
        # Experts in files are numbered, and have another shape than the stack.
        return parts != [self._plain_name(name)] or self._shape(parts[0]) == shape

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open_file_with(name).get_slice(name).get_shape())

    def _names_in_files(self, name: str) -> list[str]:
        match = None if name in self._file_by_name else _STACKED.fullmatch(name)
        if match is None:
            return [self._plain_name(name)]
        prefix, kind = match.groups()
        parts = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        return [self._expert_name(prefix, 0, part) for part in parts]

    def _plain_name(self, name: str) -> str:
        mixtral = name.replace(".mlp.", ".block_sparse_moe.")
        return mixtral if name not in self._file_by_name and mixtral in self._file_by_name else name

    def _expert_name(self, prefix: str, expert: int, part: str) -> str:
        name = f"{prefix}.{expert}.{part}.weight"
        mixtral = f"{prefix.replace('.mlp.', '.block_sparse_moe.')}.{expert}.{_MIXTRAL[part]}.weight"
        return mixtral if name not in self._file_by_name and mixtral in self._file_by_name else name

    def _open_file_with(self, name: str) -> Any:
        return self._open(self._file_by_name[name])

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(file, "pt")
        return self._files[file]
