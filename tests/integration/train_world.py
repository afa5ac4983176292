"""Two gloo processes for test_train_world.py: runs every case in one world, and writes what each gave to a JSON file.

python train_world.py FOLDER RANK WORLD
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tandem.checkpoint import folders, sharded
from tandem.checkpoint.export import export
from tandem.checkpoint.folders import SavedState
from tandem.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, ParallelismConfig, TrainConfig
from tandem.data.build import tokenizer_files
from tandem.data.order import Order, Sampler
from tandem.data.packing import Rows
from tandem.data.tokenize import TextEncoder
from tandem.errors import StorageError
from tandem.train.adapters.lora import add_adapters
from tandem.train.loop import LoopState, StepReport, train
from tandem.train.model.build import build_model
from tandem.train.model.recompute import recompute_activations
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.parallelize import parallelize

STEPS = 6


class Listed:
    """Rows of one rank, from an array."""

    def __init__(self, rows: Rows, rank: int, world: int, done: int = 0) -> None:
        self._rows, self._rank, self._world = rows, rank, world
        self._sampler = Sampler(Order(shards=(1,), weights=(1.0,), seed=0), lambda position: len(rows))
        self._sampler.share(0, 1, done)

    def take(self, count: int) -> Rows:
        return self._rows[[position.row for position in self._sampler.share(self._rank, self._world, count)]]


class World:
    """The cases, and what they share."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        import numpy as np

        self.folder, self.rank, self.world = folder, rank, world
        self.encoder = TextEncoder(str(folder / "tokenizer"))
        self.rows = np.load(folder / "rows.npy")

    def config(self, strategy: str, *, lora: bool = False, **changes: Any) -> TrainConfig:
        model = ModelConfig(
            hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64
        )
        return TrainConfig(
            name="t",
            data=DataConfig(path="x", sequence_length=32),
            model=replace(model, base="b@1") if lora else model,
            lora=LoraConfig(rank=4) if lora else None,
            parallel=ParallelismConfig(workers=self.world, strategy=strategy),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5),
            steps=STEPS,
            batch_size=4,
            **changes,
        )

    def build(self, config: TrainConfig) -> tuple[Any, torch.optim.Optimizer]:
        model: Any = build_model(config.model, None, self.encoder, seed=0)
        if config.lora:
            model = add_adapters(model, config.lora, base_id="b@1", seed=0)
        model = recompute_activations(model, config.recompute)
        mesh = Degrees.of(config.parallel).mesh("cpu", self.world)
        model = parallelize(model, mesh, config, torch.device("cpu"))
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-2, betas=config.optimizer.betas)

    def run(
        self, config: TrainConfig, parts: tuple[Any, Any], state: LoopState, stop: int = STEPS, root: Path | None = None
    ):
        """Train to `stop` of the config's steps; saves there if `root` is given. Returns the losses."""
        losses: list[float] = []

        class Stop(Exception):
            pass

        def report(step: StepReport) -> None:
            losses.append(step.loss)

        def save(now: LoopState) -> None:
            if root:
                saved = SavedState(step=now.step, tokens=now.tokens, loss=losses[-1], world=self.world, cursor={})
                sharded.save(root, parts[0], parts[1], saved, keep=2)
            if now.step == stop:
                raise Stop

        degrees = Degrees.of(config.parallel)
        rank, ranks = degrees.data_rank(self.rank), degrees.data_parallel
        rows = Listed(self.rows, rank, ranks, state.step * config.batch_size)
        try:
            train(*parts, rows, config, state, report=report, save=save, device=torch.device("cpu"))
        except Stop:
            pass
        return losses

    def losses(self, strategy: str, *, tensor: int = 1, **changes: Any) -> list[float]:
        config = self.config(strategy, **changes)
        config = replace(config, parallel=replace(config.parallel, tensor=tensor))
        return self.run(config, self.build(config), LoopState())

    def resumed(self, strategy: str, lora: bool) -> dict[str, Any]:
        """The losses of a run that stops at step 3 and goes on in a new model."""
        root = self.folder / f"resume-{strategy}-{lora}-{self.world}"
        config = self.config(strategy, lora=lora)
        config = replace(config, checkpoint=replace(config.checkpoint, every_steps=3))
        losses = self.run(config, self.build(config), LoopState(), stop=3, root=root)
        parts = self.build(replace(config, seed=1))
        newest = folders.latest(root)
        assert newest is not None
        found = sharded.load(newest, parts[0], parts[1])
        losses += self.run(config, parts, LoopState(found.step, found.tokens), root=root)
        target = self.folder / f"export-{strategy}-{lora}-{self.world}"
        export(parts[0].whole, parts[0].weights(), target, extra_files=tokenizer_files(self.folder / "tokenizer"))
        return {"losses": losses, "saved": [p.name for p in folders.list_complete(root)]}

    def full_disk(self) -> dict[str, Any]:
        """What a save says when files may not grow, and whether the save before is still good."""
        root = self.folder / "full"
        config = self.config("fsdp2")
        parts = self.build(config)
        held = (parts[0], parts[1])
        sharded.save(root, *held, SavedState(step=1, tokens=1, loss=1.0, world=self.world), keep=2)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        said = ""
        try:
            sharded.save(root, *held, SavedState(step=2, tokens=2, loss=1.0, world=self.world), keep=2)
        except StorageError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        newest = folders.latest(root)
        assert newest is not None
        model, optimizer = self.build(config)
        loaded = sharded.load(newest, model, optimizer)
        return {"said": said, "step": loaded.step}


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    here = World(folder, rank, world)
    cases: dict[str, Callable[[], Any]] = {
        "ddp": lambda: here.losses("ddp"),
        "fsdp2": lambda: here.losses("fsdp2"),
        "accumulated": lambda: here.losses("fsdp2", accumulate=2),
        "ddp accumulated": lambda: here.losses("ddp", accumulate=2),
        "lora ddp": lambda: here.losses("ddp", lora=True),
        "lora fsdp2": lambda: here.losses("fsdp2", lora=True),
        "resumed": lambda: here.resumed("fsdp2", lora=False),
        "resumed ddp": lambda: here.resumed("ddp", lora=False),
        "resumed lora": lambda: here.resumed("fsdp2", lora=True),
    }
    if world > 1:
        cases["full disk"] = here.full_disk
        cases["compiled"] = lambda: here.losses("fsdp2", compile=True)
        cases["compiled, cut"] = lambda: here.losses("fsdp2", compile=True, tensor=2)
        cases["compiled, recomputed"] = lambda: here.losses("fsdp2", compile=True, recompute="selective")
    results = {name: case() for name, case in cases.items()}
    (folder / f"results-{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
