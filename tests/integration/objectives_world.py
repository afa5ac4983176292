"""Processes for test_objectives_world.py: DPO, averages, evaluations and precisions, each case in one world of gloo ranks.

python objectives_world.py FOLDER RANK WORLD
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from train_world import Listed

from tandem.checkpoint import folders, sharded
from tandem.checkpoint.export import export
from tandem.checkpoint.folders import SavedState
from tandem.config import (
    DataConfig,
    DpoConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    TrainConfig,
)
from tandem.data.tokenize import TextEncoder
from tandem.train.adapters.lora import add_adapters
from tandem.train.ema import Ema
from tandem.train.loop import LoopState, StepReport, train
from tandem.train.model.build import build_model
from tandem.train.model.precision import LossScaler
from tandem.train.model.recompute import recompute_activations
from tandem.train.objectives.dpo import AdapterDisabledReference, Dpo, FrozenReference
from tandem.train.objectives.evaluate import evaluate
from tandem.train.objectives.objective import NextToken, Objective
from tandem.train.parallel.mesh import Degrees
from tandem.train.parallel.strategy import parallelize_for_training, parallelize_frozen

STEPS = 5
CPU = torch.device("cpu")
SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)


class Run:
    """One training run and what it reported."""

    def __init__(self, here: World, config: TrainConfig, *, seed: int = 0) -> None:
        self.here, self.config = here, config
        self.degrees = Degrees.of(config.parallel)
        model: Any = build_model(config.model, None, here.encoder, seed)
        if config.lora:
            model = add_adapters(model, config.lora, base_id="b@1", seed=seed)
        model = recompute_activations(model, config.recompute)
        self.mesh = self.degrees.mesh("cpu", here.world)
        self.model, self.optimizer = parallelize_for_training(model, self.mesh, config, CPU)
        self.ema = Ema(self.model, config.ema) if config.ema is not None else None
        self.scaler = LossScaler() if config.precision == "float16" else None
        self.objective = self._objective()
        self.reports: list[StepReport] = []
        self.evaluations: list[dict[str, float]] = []

    def _objective(self) -> Objective:
        if self.config.objective == "next_token":
            return NextToken()
        if self.config.lora:
            return Dpo(self.config.dpo or DpoConfig(), AdapterDisabledReference())
        # Another seed than the trained model's: at the start, too, some pairs are preferred.
        reference = build_model(self.config.model, None, self.here.encoder, seed=7).requires_grad_(False)
        frozen = FrozenReference(parallelize_frozen(reference, self.mesh, self.config, CPU))
        return Dpo(self.config.dpo or DpoConfig(), frozen)

    @property
    def extra(self) -> dict[str, Any]:
        named = {"ema": self.ema, "scaler": self.scaler}
        return {name: thing for name, thing in named.items() if thing is not None}

    def measure(self, rows: Any) -> dict[str, float]:
        return evaluate(self.model, self.objective, rows, batch_rows=2, device=CPU, precision=self.config.precision)

    def _evaluate(self, step: int) -> None:
        rows = self.here.held[self.config.objective]
        self.evaluations.append(self.measure(rows))
        if self.ema:
            with self.ema.swapped(self.model):
                averaged = self.measure(rows)
            self.evaluations[-1]["averaged"] = averaged["loss"]

    def go(self, *, stop: int = STEPS, resume: bool = False, root: Path | None = None) -> Run:
        """Train from the start or the newest checkpoint below `root`, and save at `stop`."""
        state = LoopState()
        if resume:
            newest = folders.latest(root) if root else None
            assert newest is not None
            found = sharded.load(newest, self.model, self.optimizer, extra=self.extra)
            state = LoopState(found.step, found.tokens)

        class Stop(Exception):
            pass

        def save(now: LoopState) -> None:
            if root:
                saved = SavedState(step=now.step, tokens=now.tokens, loss=None, world=self.here.world)
                sharded.save(root, self.model, self.optimizer, saved, keep=2, extra=self.extra)
            if now.step == stop:
                raise Stop

        done = state.step * self.config.batch_size
        rows = Listed(self.here.rows[self.config.objective], self.here.rank, self.here.world, done)
        try:
            train(
                self.model, self.optimizer, rows, self.config, state, report=self.reports.append,
                save=save, device=CPU, objective=self.objective, ema=self.ema, scaler=self.scaler,
                evaluate=self._evaluate if self.config.evaluation else None,
            )  # fmt: skip
        except Stop:
            pass
        return self

    @property
    def told(self) -> dict[str, Any]:
        steps = [{k: v for k, v in asdict(r).items() if k in ("loss", "grad_norm", "metrics")} for r in self.reports]
        return {"steps": steps, "evaluations": self.evaluations}


class World:
    """What the cases share."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.encoder = TextEncoder(str(folder / "tokenizer"))
        kinds = {"next_token": "text", "dpo": "preferences"}
        self.rows = {kind: np.load(folder / f"{name}.npy")[7:] for kind, name in kinds.items()}
        # An odd number: the ranks' shares differ.
        self.held = {kind: np.load(folder / f"{name}.npy")[:7] for kind, name in kinds.items()}

    def config(
        self, strategy: str, *, lora: bool = False, objective: str = "next_token", **changes: Any
    ) -> TrainConfig:
        base = lora or objective == "dpo"
        return TrainConfig(
            name="t",
            data=DataConfig(path="x", sequence_length=32),
            model=replace(SHAPE, base="b@1") if base else SHAPE,
            lora=LoraConfig(rank=4) if lora else None,
            objective=objective,
            dpo=DpoConfig(beta=0.5, label_smoothing=0.1) if objective == "dpo" else None,
            parallel=ParallelismConfig(workers=self.world, strategy=strategy),
            optimizer=OptimizerConfig(
                learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, weight_decay=0.3, decay_embeddings=False
            ),
            evaluation=EvaluationConfig(every_steps=2),
            steps=STEPS,
            batch_size=4,
            accumulate=2,
            **changes,
        )

    def run(self, strategy: str, **changes: Any) -> dict[str, Any]:
        return Run(self, self.config(strategy, **changes)).go().told

    def undisturbed(self, strategy: str, **changes: Any) -> dict[str, Any]:
        """The same run without evaluations."""
        return Run(self, replace(self.config(strategy, **changes), evaluation=None)).go().told

    def resumed(self, strategy: str) -> dict[str, Any]:
        """A run with an average that stops at step 2 and goes on in a new model; the average is exported."""
        root = self.folder / f"resume-{strategy}-{self.world}"
        config = self.config(strategy, ema=0.7, precision="float16")
        config = replace(config, checkpoint=replace(config.checkpoint, every_steps=2))
        first = Run(self, config).go(stop=2, root=root)
        second = Run(self, config, seed=1).go(resume=True, root=root)
        assert second.ema is not None
        with second.ema.swapped(second.model):
            export(second.model.whole, second.model.weights(), self.folder / f"export-{strategy}-{self.world}")
        return {key: first.told[key] + second.told[key] for key in first.told}

    def overflowing(self) -> dict[str, Any]:
        """A float16 run whose first scale is far too large."""
        run = Run(self, self.config("fsdp2", precision="float16"))
        run.scaler = LossScaler(2.0**127)
        return run.go().told


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    here = World(folder, rank, world)
    cases: dict[str, Callable[[], Any]] = {
        "overflow": here.overflowing,
        "undisturbed": lambda: here.undisturbed("fsdp2", ema=0.7),
        "undisturbed lora": lambda: here.undisturbed("fsdp2", objective="dpo", lora=True),
        "float16": lambda: here.run("fsdp2", precision="float16", ema=0.7),
        "bfloat16": lambda: here.run("fsdp2", precision="bfloat16"),
        "resumed": lambda: here.resumed("fsdp2"),
        "selective": lambda: here.run("fsdp2", recompute="selective", ema=0.7),
        "full": lambda: here.run("fsdp2", recompute="full", ema=0.7),
    }
    for strategy in ("fsdp2", "ddp") if world > 1 else ("fsdp2",):
        cases[f"ema {strategy}"] = lambda s=strategy: here.run(s, ema=0.7)
        cases[f"dpo {strategy}"] = lambda s=strategy: here.run(s, objective="dpo", ema=0.7)
        cases[f"dpo lora {strategy}"] = lambda s=strategy: here.run(s, objective="dpo", lora=True)
    results = {name: case() for name, case in cases.items()}
    (folder / f"results-{world}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
