"""A Hugging Face folder of safetensors files, of which each rank reads the boxes that it has room for.

A mixture's experts lie in files one by one, where a model has them stacked: (E, 2I, H), gate above up, and (E, H, I).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")


class Source:
    """The tensors of a folder, by name. Files stay open, and are read where they are asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self._files: dict[Path, Any] = {}
        self._in: dict[str, Path] = {}
        if index.exists():
            self._in = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        elif (single := folder / "model.safetensors").exists():
            self._in = dict.fromkeys(self._open(single).keys(), single)

    def lacks(self, names: Iterable[str]) -> list[str]:
        """Those of a model's tensors that cannot be read from here."""
        return [name for name in names if not set(self._parts_of(name)) <= self._in.keys()]

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a tensor of the model, in the type that the file has."""
        if name in self._in:
            return self._slice(name, offsets, sizes)
        stacked = _STACKED.fullmatch(name)
        assert stacked is not None, f"{name} is not there: see `lacks`"
        prefix, kind = stacked.groups()
        experts = range(offsets[0], offsets[0] + sizes[0])
        return torch.stack([self._expert(prefix, kind, expert, offsets[1:], sizes[1:]) for expert in experts])

    def _expert(self, prefix: str, kind: str, expert: int, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        if kind == "down_proj":
            return self._slice(f"{prefix}.{expert}.down_proj.weight", offsets, sizes)
        found = []
        first, last = offsets[0], offsets[0] + sizes[0]
        for place, half in enumerate(("gate_proj", "up_proj")):
            name = f"{prefix}.{expert}.{half}.weight"
            width = self._of(name).get_slice(name).get_shape()[0]
            start, stop = max(first - place * width, 0), min(last - place * width, width)
            if start < stop:
                found.append(self._slice(name, (start, offsets[1]), (stop - start, sizes[1])))
        return torch.cat(found)

    def _slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        where = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
        held: Tensor = self._of(name).get_slice(name)[where] if where else self._of(name).get_tensor(name)
        return held

    def _parts_of(self, name: str) -> list[str]:
        stacked = None if name in self._in else _STACKED.fullmatch(name)
        if stacked is None:
            return [name]
        prefix, kind = stacked.groups()
        return [
            f"{prefix}.0.{part}.weight"
            for part in (("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj"))
        ]

    def _of(self, name: str) -> Any:
        return self._open(self._in[name])

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(file, "pt")
        return self._files[file]
