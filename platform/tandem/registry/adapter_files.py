"""Validation of LoRA adapter folders: format, rank, and layers and shapes of the base. Reads headers only, without torch.

The format is peft's: adapter_config.json, and adapter_model.safetensors with a pair of matrices for each adapted layer
(https://huggingface.co/docs/peft/developer_guides/checkpoint). What vLLM would take and then answer wrongly with, such as a rank
of its own for each layer, is refused too.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tandem.errors import AdapterError
from tandem.ids import digest, file_digest, folder_digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
"""The files of an adapter; others beside them are ignored."""
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MAX_CONFIG_BYTES = 2**20

_UNSUPPORTED_KEYS = {
    "modules_to_save": "whole layers beside the adapter (modules_to_save), which vLLM does not serve. Merge it into its base",
    "rank_pattern": "ranks of their own for some layers (rank_pattern), which vLLM scales wrongly. Merge it into its base",
    "alpha_pattern": "scales of their own for some layers (alpha_pattern), which vLLM ignores. Merge it into its base",
    "trainable_token_indices": "trained tokens (trainable_token_indices), which vLLM ignores. Merge it into its base",
    "lora_bias": "biases (lora_bias), which vLLM does not serve. Train it without",
}
"""Keys of adapter_config.json that must be empty, each with the feature that it stands for and the next step."""
_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<kind>A|B|embedding_A|embedding_B)(?P<weight>\.weight)?"
)
_MAGNITUDE = re.compile(r".+\.lora_magnitude_vector(\.weight)?")
_BASE_COPY = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Copies of the base's own embeddings, which peft may add and vLLM passes over."""
_PREFIXES = (
    "base_model.",
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "transformer.",
    "model.",
)
"""Prefixes of layer names, which differ between a model's files and an adapter's where a model is part of another."""
_COMPARED_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
"""Types in which a weight has its layer's own shape; others hold several numbers in one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFiles:
    """Properties of a valid adapter, by its files."""

    rank: int
    dora: bool
    """It has to be merged before it can be served."""
    layers: tuple[str, ...]
    """The layers that it adapts."""
    size_bytes: int


def check_adapter(folder: Path, base: Path | None = None) -> AdapterFiles:
    """Read what is needed to know that the adapter in `folder` can be served on the model in `base`.

    Raises AdapterError with the reason if it cannot. A base that is not known, or cannot be read, is not compared with.
    """
    config = _read_config(folder)
    rank = _rank(config, folder / CONFIG)
    tensors = headers(folder / WEIGHTS)
    pairs = _pairs(tensors, dora=config.get("use_dora") is True)
    base_layers = base_shapes(base) if base is not None else {}
    for layer, pair in pairs.items():
        if ".experts" not in layer:
            _check_layer(layer, pair, rank, base_layers, swapped=config.get("fan_in_fan_out") is True)
    return AdapterFiles(
        rank=rank,
        dora=config.get("use_dora") is True,
        layers=tuple(sorted(pairs)),
        size_bytes=sum((folder / name).stat().st_size for name in FILES),
    )


def adapter_digest(folder: Path) -> str:
    """sha256 over the names and contents of an adapter's two files."""
    return digest([[name, file_digest(folder / name)] for name in FILES])


def is_unchanged(folder: Path, expected: str) -> bool:
    """Whether the files in `folder` have the digest under which they were registered (before 0.2: over the whole folder)."""
    return adapter_digest(folder) == expected or folder_digest(folder) == expected


def headers(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a safetensors file. Every length and offset in its header is checked against the file.

    Raises AdapterError if one cannot be.
    """
    try:
        with safe_open(file, "np") as weights_file:
            slices = {name: weights_file.get_slice(name) for name in weights_file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            f"{file} is not a safetensors file that can be read: {error}. Save the adapter again."
        ) from error


def base_shapes(folder: Path) -> Mapping[str, tuple[int, ...] | None]:
    """The shape of each layer's weight in a model's files, by its name without prefixes; None where it is packed."""
    try:
        files = tuple((file, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors")))
    except OSError:
        return {}
    return _shapes_in(files)


def layer_kinds(folder: Path) -> list[str]:
    """The last parts of the names of a model's layers, such as q_proj: matrices first, and of these the most frequent."""
    shapes = base_shapes(folder)
    counts = Counter(
        (shape is None, layer.rpartition(".")[2]) for layer, shape in shapes.items() if ".experts" not in layer
    )
    return [kind for (_, kind), _ in sorted(counts.items(), key=lambda item: (item[0][0], -item[1]))]


@functools.lru_cache(maxsize=16)
def _shapes_in(files: tuple[tuple[Path, int], ...]) -> Mapping[str, tuple[int, ...] | None]:
    shapes: dict[str, tuple[int, ...] | None] = {}
    try:
        for file, _ in files:
            for name, (kind, shape) in headers(file).items():
                layer, _, suffix = name.rpartition(".")
                has_own_shape = suffix == "weight" and kind in _COMPARED_TYPES and len(shape) == 2
                if has_own_shape or _without_prefix(layer) not in shapes:
                    shapes[_without_prefix(layer)] = shape if has_own_shape else None
    except AdapterError:
        return {}
    if "lm_head" not in shapes and "embed_tokens" in shapes:
        shapes["lm_head"] = shapes["embed_tokens"]  # tied
    return shapes


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"There is no folder {folder}, so no adapter to register or load.")
    path = folder / CONFIG
    if not path.is_file():
        hint = " It has config.json: register it as model." if (folder / "config.json").is_file() else ""
        raise AdapterError(f"{folder} holds no {CONFIG}, so it is not an adapter.{hint}")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(
                f"{path} has {path.stat().st_size} bytes; an adapter's config has at most {MAX_CONFIG_BYTES}."
            )
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} holds a {type(values).__name__}; it must be a JSON object.")
    if not (folder / WEIGHTS).is_file():
        pickled = next((name for name in PICKLES if (folder / name).is_file()), None)
        if pickled:
            raise AdapterError(
                f"{folder} holds {pickled}, a pickle, which can run any code when it is opened. Load it where you trust it, and "
                "save it again with peft's save_pretrained(), which writes safetensors."
            )
        raise AdapterError(
            f"{folder} holds no {WEIGHTS}, so it is not an adapter that can be served. Save it with peft's save_pretrained()."
        )
    return values


def _rank(config: Mapping[str, Any], path: Path) -> int:
    """The rank; AdapterError for a config that vLLM cannot follow."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type is {kind!r}; only LORA adapters are served. Merge it into its base.")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{path}: r is {rank!r}; it must be a rank of at least 1.")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: lora_alpha is {alpha!r}; it must be a finite number.")
    if not isinstance(config.get("target_modules"), list | str):
        raise AdapterError(
            f"{path}: target_modules is {config.get('target_modules')!r}; it must name the adapted layers."
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path}: bias is {config['bias']!r}; vLLM serves adapters without biases only. Train it with bias: none."
        )
    for key, problem in _UNSUPPORTED_KEYS.items():
        if config.get(key):
            raise AdapterError(f"{path}: the adapter has {problem}.")
    return rank


def _pairs(tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, dora: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of A and B by layer; AdapterError for a tensor that is neither, and for a layer that lacks one."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (kind, shape) in tensors.items():
        if name.endswith(_BASE_COPY) or (dora and _MAGNITUDE.fullmatch(name)):
            continue
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or (match["weight"] is None) != match["kind"].startswith("embedding"):
            raise AdapterError(
                f"{WEIGHTS} holds {name}, which is no LoRA matrix. Save the adapter with peft's save_pretrained()."
            )
        if kind not in ("F64", "F32", "F16", "BF16"):
            raise AdapterError(f"{WEIGHTS}: {name} is of type {kind}; LoRA matrices are F32, F16 or BF16.")
        if len(shape) != 2:
            raise AdapterError(f"{WEIGHTS}: {name} has {len(shape)} dimensions {shape}; a LoRA matrix has 2.")
        pairs.setdefault(match["layer"], {})[match["kind"]] = shape
    if not pairs:
        raise AdapterError(f"{WEIGHTS} holds no LoRA matrix. Save the adapter with peft's save_pretrained().")
    for layer, pair in pairs.items():
        if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            raise AdapterError(
                f"{WEIGHTS}: {layer} has lora_{' and lora_'.join(sorted(pair))}; it must have one A and one B."
            )
    return pairs


def _check_layer(
    layer: str,
    pair: Mapping[str, tuple[int, ...]],
    rank: int,
    base_layers: Mapping[str, tuple[int, ...] | None],
    *,
    swapped: bool,
) -> None:
    embedding = "embedding_A" in pair
    a, b = (pair["embedding_A"], pair["embedding_B"]) if embedding else (pair["A"], pair["B"])
    if a[0] != rank or b[1] != rank:
        raise AdapterError(
            f"{WEIGHTS}: {layer} has A {a} and B {b}; with rank {rank} they are ({rank}, in) and (out, {rank})."
        )
    if not base_layers:
        return
    layer_name = _without_prefix(layer)
    if layer_name not in base_layers:
        raise AdapterError(
            f"The adapter adapts {layer}, and its base has no such layer. It was made for another model."
        )
    shape = base_layers[layer_name]
    if shape is None:
        return
    # An embedding's weight is (in, out), and so is that of GPT-2's linear layers, which are convolutions of width one.
    rows, columns = shape[::-1] if embedding or swapped else shape
    if (b[0], a[1]) != (rows, columns):
        raise AdapterError(
            f"The adapter has {layer} from {a[1]} to {b[0]}, and its base has it from {columns} to {rows}. "
            "It was made for another model."
        )


def _without_prefix(layer: str) -> str:
    return next((layer.removeprefix(prefix) for prefix in _PREFIXES if layer.startswith(prefix)), layer)
