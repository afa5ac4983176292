"""Two processes for test_sharded_import.py: bases read in slices, in every layout, and what that takes of memory.

python import_world.py FOLDER RANK WORLD
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from resume_world import load_parity

from tandem.checkpoint.export import export, export_tensors
from tandem.config import ModelConfig
from tandem.data.tokenize import TextEncoder
from tandem.train.adapters.lora import add_adapters
from tandem.train.model.build import build_model
from tandem.train.model.stage import TransformersForward
from tandem.train.parallel.canonical import canonical
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.sharded_load import build_empty_model, load_weights, to_meta
from tandem.train.parallel.strategy import parallelize_for_training

CPU = torch.device("cpu")
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp2": ("llama", {"strategy": "fsdp2"}),
    "untied": ("llama untied", {"strategy": "fsdp2"}),
    "tp2": ("llama", {"tensor": 2}),
    "pp2": ("llama", {"pipeline": 2}),
    "pp2 zero bubble": ("llama", {"pipeline": 2, "schedule": "zero_bubble"}),
    "offloaded": ("qwen3", {"offload": True}),
    "lora": ("llama+lora", {"strategy": "fsdp2"}),
    "lora tp2": ("llama+lora", {"tensor": 2}),
    "lora pp2": ("llama+lora", {"pipeline": 2}),
    "other family": ("gemma2", {"strategy": "fsdp2"}),
    "other family offloaded": ("gemma2", {"offload": True}),
    "moe": ("moe", {"strategy": "fsdp2"}),
    "moe ep2": ("moe", {"expert": 2}),
    "moe tp2": ("moe", {"tensor": 2}),
}
WIDE = {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "intermediate_size": 2048}


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon")


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """How much more memory than at its beginning the block takes at most; looked at every two milliseconds."""
    gc.collect()
    began, found, over = anonymous(), [0], threading.Event()

    def look() -> None:
        while not over.is_set():
            found[0] = max(found[0], anonymous() - began)
            time.sleep(0.002)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield found
    found[0] = max(found[0], anonymous() - began)
    over.set()
    thread.join()


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    parity = load_parity()
    told: dict[str, Any] = {}
    checked: list[str] = []
    check = TransformersForward.check_documents

    def counted(self: TransformersForward, device: torch.device) -> None:
        check(self, device)
        checked.append(name)

    setattr(TransformersForward, "check_documents", counted)  # noqa: B010 - mypy takes no assignment to a method
    for name, (kind, parallel) in LAYOUTS.items():
        case = parity.Case(
            model=kind.removesuffix(" untied"), workers=world, parallel=parallel, tied="untied" not in kind,
            accumulate=4 if "bubble" in name else 2,
        )  # fmt: skip
        plain = parity.new_model(replace(case, model=case.model.removesuffix("+lora")))
        base = folder / "bases" / name
        # Small files: a rank opens several.
        export(plain, export_tensors(plain), base, file_bytes=30_000)
        config = parity.config_of(case)
        empty: Any = build_empty_model(config, base)
        assert empty is not None
        if config.lora:
            empty, plain = (add_adapters(m, config.lora, base_id="b", seed=0) for m in (empty, plain))
        adapters = to_meta(empty)
        model, _ = parallelize_for_training(empty, Degrees.of(config.parallel).mesh("cpu", world), config, CPU)
        load_weights(model, base, adapters, CPU)
        expected: dict[str, Any] = dict(plain.named_parameters())
        held = canonical(model.whole, dict(model.whole.named_parameters()))
        rotary: Any = next(b for n, b in model.whole.named_buffers() if "inv_freq" in n)
        told[name] = {
            "same": all(
                torch.equal(box, expected[n][tuple(slice(a, a + s) for a, s in zip(at, box.shape, strict=True))])
                for n, part in held.items()
                for at, box in part.chunks.items()
            ),
            "elements": sum(box.numel() for part in held.values() for box in part.chunks.values()) / model_size(plain),
            "trained": all(
                p.requires_grad == ("lora_" in n or config.lora is None) for n, p in model.whole.named_parameters()
            ),
            "checked": checked.count(name) == ("gemma" in kind),
            "rotary": torch.equal(rotary, next(b for n, b in plain.named_buffers() if "inv_freq" in n)),
        }
        # What was read goes on as what was built.
        if name == "moe":
            export(model.whole, model.weights(), folder / "again", file_bytes=30_000)
    told["memory"] = memory(parity, folder, world)
    dora = parity.config_of(parity.Case(model="llama+dora", workers=world, parallel={"strategy": "fsdp2"}))
    told["dora"] = {"reads all": build_empty_model(dora, folder / "bases" / "fsdp2") is None}
    (folder / f"results-{world}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def model_size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def memory(parity: Any, folder: Path, world: int) -> dict[str, int]:
    """Bytes that a base (135 MB in float32) takes of a rank that reads it whole to shard it, and of one that reads slices."""
    encoder = TextEncoder(str(folder / "tokenizer"))
    shape = ModelConfig(**WIDE, max_length=64)
    base, config = (
        folder / "bases" / "wide",
        parity.config_of(parity.Case(workers=world, parallel={"strategy": "fsdp2"})),
    )
    config = replace(config, model=replace(shape, base=str(base)))
    model = build_model(shape, None, encoder, 0)
    size = sum(p.numel() * 4 for p in model.parameters())
    # As bases are published. What is read in the type that it is to have, transformers leaves to the file system's cache.
    model.bfloat16()
    export(model, export_tensors(model), base)
    del model
    mesh = Degrees.of(config.parallel).mesh("cpu", world)
    with peak() as slices:
        empty = build_empty_model(config, base)
        assert empty is not None
        to_meta(empty)
        filled, _ = parallelize_for_training(empty, mesh, config, CPU)
        load_weights(filled, base, {}, CPU)
    del empty, filled
    with peak() as whole:
        built, _ = parallelize_for_training(build_model(config.model, base, encoder, 0), mesh, config, CPU)
    del built
    return {"model": size, "slices": slices[0], "whole": whole[0]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
