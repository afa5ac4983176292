"""Processes for test_deepspeed.py: what one process trains, and two under each of DeepSpeed's stages and offloads.

python deepspeed_world.py FOLDER RANK WORLD CASES, where CASES is `quick`, for those that every run of the tests has, or `rest`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from objectives_world import Run, World

from tandem.checkpoint.export import export
from tandem.config import DeepSpeedConfig, ModelConfig
from tandem.errors import EnvironmentProblem
from tandem.train.model.precision import LossScaler
from tandem.train.parallel import deepspeed

ZERO = {
    "zero 1": DeepSpeedConfig(stage=1),
    "zero 2": DeepSpeedConfig(stage=2),
    "zero 3": DeepSpeedConfig(stage=3),
    "zero 1 offloaded": DeepSpeedConfig(stage=1, offload_optimizer="cpu"),
    "zero 2 offloaded": DeepSpeedConfig(stage=2, offload_optimizer="cpu"),
    "zero 3 offloaded": DeepSpeedConfig(stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
    "zero 3, parameters offloaded": DeepSpeedConfig(stage=3, offload_parameters="cpu"),
}


QUICK = (
    *("zero 1", "zero 2", "zero 3", "zero 3 offloaded", "overflow"),
    *("lora zero 3", "dpo lora zero 2", "dpo zero 3", "ema zero 2", "full zero 3", "float16 zero 2", "bfloat16 zero 3"),
    *("zero 2 resumed", "zero 3 resumed", "lora zero 3 resumed", "zero 3 to fsdp2", "fsdp2 to zero 3"),
)
"""Cases of two processes that every run has: each stage, and each kind of run at one of them."""

WIDE = ModelConfig(hidden_size=512, num_layers=2, num_heads=4, num_kv_heads=4, intermediate_size=2048, max_length=64)
"""DeepSpeed leaves in memory what is below 1 MiB on a rank."""


class ZeroWorld(World):
    """The cases."""

    def wide(self, zero: DeepSpeedConfig | None = None, *, resume: bool = False) -> dict[str, Any]:
        """A model that is large enough to go to a disk; what is said if it cannot."""
        try:
            config = replace(self.config("deepspeed" if zero else "fsdp2", deepspeed=zero), model=WIDE)
            # At 1e-2 a wide model is thrown about, and its rounding errors grow a hundredfold.
            config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-3))
            run = Run(self, config)
        except EnvironmentProblem as error:
            return {"refused": str(error)}
        if not resume:
            told = run.go().told
            told["on disk"] = zero is not None and len(list(self.folder.glob("disk/**/*_param.tensor.swp")))
            self._end(run)
            return told
        root = self.folder / "checkpoints" / "disk"
        run.config = replace(config, checkpoint=replace(config.checkpoint, every_steps=2))
        first = run.go(root=root, stop=2)
        self._end(run)
        second = Run(self, run.config, seed=1).go(root=root, resume=True)
        self._end(second)
        return {key: first.told[key] + second.told[key] for key in first.told}

    def zero(self, name: str, **changes: Any) -> dict[str, Any]:
        return self.run("deepspeed", deepspeed=ZERO[name], **changes)

    def _end(self, run: Run) -> None:
        dist.barrier()
        run.model.close()

    def overflowing_zero(self) -> dict[str, Any]:
        """A float16 run whose first scale is far too large."""
        run = Run(self, self.config("deepspeed", precision="float16", deepspeed=ZERO["zero 2"]))
        run.scaler = LossScaler(2.0**127)
        return run.go().told

    def passed_on(self, first: str, second: str, **changes: Any) -> dict[str, Any]:
        """A run that stops at step 2 under one strategy, and goes on in a new model under another; exported at the end."""
        label = f"{first} to {second}{' lora' if changes.get('lora') else ''}"
        root = self.folder / "checkpoints" / label
        runs = []
        for name in (first, second):
            strategy, zero = ("deepspeed", ZERO[name]) if name in ZERO else (name, None)
            config = self.config(strategy, deepspeed=zero, **changes)
            config = replace(config, checkpoint=replace(config.checkpoint, every_steps=2))
            run = Run(self, config, seed=0 if changes.get("lora") else len(runs))
            runs.append(run.go(root=root, **({"resume": True} if runs else {"stop": 2})))
        export(runs[1].model.whole, runs[1].model.weights(), self.folder / "exports" / label)
        return {key: runs[0].told[key] + runs[1].told[key] for key in runs[0].told}


def main(folder: Path, rank: int, world: int, chosen: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    # Of so small a model, ZeRO 3 would leave all parameters whole.
    deepspeed.PERSISTENCE_THRESHOLD = 100
    here = ZeroWorld(folder, rank, world)
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora": {"lora": True},
        "dpo": {"objective": "dpo"},
        "dpo lora": {"objective": "dpo", "lora": True},
        "bfloat16": {"precision": "bfloat16"},
        "float16": {"precision": "float16"},
        "ema": {"ema": 0.7},
    }
    cases: dict[str, Callable[[], Any]] = {}
    if world == 1:
        cases = {name: lambda changes=changes: here.run("fsdp2", **changes) for name, changes in kinds.items()}
        cases["zero 3"] = lambda: here.zero("zero 3")
        cases["wide"] = here.wide
    else:
        for name in ZERO:
            cases[name] = lambda name=name: here.zero(name)
        for stage in ("zero 1", "zero 2", "zero 3"):
            for kind in ("lora", "dpo lora", "bfloat16", "float16"):
                cases[f"{kind} {stage}"] = lambda s=stage, k=kind: here.zero(s, **kinds[k])
            cases[f"{stage} resumed"] = lambda s=stage: here.passed_on(s, s)
            cases[f"{stage} to fsdp2"] = lambda s=stage: here.passed_on(s, "fsdp2")
            cases[f"fsdp2 to {stage}"] = lambda s=stage: here.passed_on("fsdp2", s)
        cases["zero 3 offloaded resumed"] = lambda: here.passed_on("zero 3 offloaded", "zero 3 offloaded")
        cases["zero 1 offloaded to zero 3"] = lambda: here.passed_on("zero 1 offloaded", "zero 3")
        cases["lora zero 3 resumed"] = lambda: here.passed_on("zero 3", "zero 3", lora=True)
        cases["dpo zero 3"] = lambda: here.zero("zero 3", objective="dpo")
        cases["overflow"] = here.overflowing_zero
        cases["ema zero 2"] = lambda: here.zero("zero 2", ema=0.7)
        disk = DeepSpeedConfig(
            stage=3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path=str(folder / "disk")
        )
        cases["disk"] = lambda: here.wide(disk)
        cases["disk resumed"] = lambda: here.wide(disk, resume=True)
        for mode in ("full", "selective"):
            cases[f"{mode} zero 3"] = lambda mode=mode: here.zero("zero 3", recompute=mode)
    quick = set(cases) - {"wide"} if world == 1 else set(QUICK)
    assert quick <= set(cases)
    cases = {name: case for name, case in cases.items() if (name in quick) == (chosen == "quick")}
    results = {name: case() for name, case in cases.items()}
    (folder / f"results-{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
