"""Processes for test_resume_layouts.py: runs that save in one layout, and runs that go on in another.

python resume_world.py FOLDER RANK WORLD NUMBER PLACE, where FOLDER/world-NUMBER.json lists what this world has to do, and PLACE
is a folder or a URI for checkpoints.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.storage import Location, join, located

ROOT = Path(__file__).parents[2]
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "tp2": {"tensor": 2},
    "cp2": {"context": 2},
    "ep2": {"expert": 2},
    "replicate": {"replicate": 2},
    "pp2": {"pipeline": 2},
    "pp2 interleaved": {"pipeline": 2, "schedule": "interleaved"},
    "pp2 zero bubble": {"pipeline": 2, "schedule": "zero_bubble"},
    "tp2 ep2": {"tensor": 2, "expert": 2},
    "zero 1": {"strategy": "deepspeed"},
    "zero 3": {"strategy": "deepspeed"},
}


def load_parity() -> Any:
    """bench/training/parity.py, which has the models, the rows and the way to build a case."""
    if str(ROOT) not in sys.path:  # this file also runs as a program of its own
        sys.path.append(str(ROOT))
    return importlib.import_module("bench.training.parity")


def run(
    parity: Any, model: str, layout: str, workers: int, root: Location, *, saves: bool, resumes: bool
) -> dict[str, Any]:
    """Train from the start, or from a checkpoint on, to the step that is saved or to the end; what was measured on the way."""
    import torch
    import torch.distributed as dist

    from tandem.checkpoint import folders, sharded
    from tandem.checkpoint.folders import SavedState
    from tandem.train.ema import Ema
    from tandem.train.loop import LoopState, train
    from tandem.train.objectives.evaluate import evaluate

    zero = {"stage": int(layout[-1])} if layout.startswith("zero") else {}
    accumulate = 4 if "bubble" in layout else 2
    case = parity.Case(
        model=model.removesuffix(" untied"), workers=workers, parallel=LAYOUTS[layout], zero=zero, accumulate=accumulate,
        tied="untied" not in model,
    )  # fmt: skip
    config = parity.config_of(case)
    config = replace(config, optimizer=replace(config.optimizer, schedule="cosine", warmup_steps=2))
    held, optimizer, objective = parity.build(case, config, seed=int(resumes and "+" not in model))
    ema = None if zero else Ema(held, 0.7)
    extra = {"ema": ema} if ema else {}
    state = LoopState()
    if resumes:
        newest = folders.latest(root)
        assert newest is not None
        if any(zero in str(root) for zero in ("zero 1", "zero 3")):
            extra = {}  # they save no average
        found = sharded.load(newest, held, optimizer, extra=extra)
        state = LoopState(found.step, found.tokens)

    class Stop(Exception):
        pass

    def save(now: LoopState) -> None:
        if saves and now.step == parity.SAVED:
            kept = SavedState(step=now.step, tokens=now.tokens, loss=None, world=workers)
            sharded.save(root, held, optimizer, kept, keep=1, extra=extra)
            raise Stop

    rows, degrees, reports = parity.all_rows(case), held.mesh.degrees, list[Any]()
    dealt = parity.RankRows(
        rows[: parity.STEPS * parity.ROWS], degrees.data_rank(dist.get_rank()), degrees.data_parallel, state.step
    )
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=parity.SAVED))
    cpu = torch.device("cpu")
    try:
        train(
            held, optimizer, dealt, config, state, report=reports.append, save=save, device=cpu, objective=objective,
            ema=ema,
        )  # fmt: skip
    except Stop:
        return {}
    told: dict[str, Any] = {
        "losses": [step.loss for step in reports],
        "norms": [step.grad_norm for step in reports],
        "rates": [step.learning_rate for step in reports],
    }
    held_out = rows[parity.STEPS * parity.ROWS :]
    share = parity.ROWS // config.parallel.data
    told["evaluation"] = [evaluate(held, objective, held_out, batch_rows=share, device=cpu)["loss"]]
    if ema and (extra or not resumes):
        with ema.swapped(held):
            told["average"] = [evaluate(held, objective, held_out, batch_rows=share, device=cpu)["loss"]]
    return told


def main(folder: Path, rank: int, world: int, number: int, place: Location) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{number}", rank=rank, world_size=world)
    parity = load_parity()
    told = {}
    for what, model, layout, source in json.loads((folder / f"world-{number}.json").read_text()):
        # Undisturbed, saving, or going on from what another layout has saved.
        root = join(place, source or f"{model} {layout} {world}")
        told[f"{what} {model} {source} {layout}"] = run(
            parity, model, layout, world, root, saves=what == "save", resumes=what == "resume"
        )
    if rank == 0:
        (folder / f"told-{number}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), located(sys.argv[5]))
