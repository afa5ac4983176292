"""Training jobs as a cluster runs them: `python -m tandem.train.launch JOB_DIR` on real Ray, with real faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stored_metrics
import yaml
from drivers import MODEL, Driver

from tandem.checkpoint import folders
from tandem.cluster.local import LocalCluster
from tandem.config import to_dict
from tandem.data.build import build_dataset
from tandem.jobs.extend import extension_of
from tandem.jobs.folder import JobFolder
from tandem.observability import codec
from tandem.registry import Registry


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train-home")
    text = folder / "text.txt"
    text.write_text(
        "".join(f"Line {n}: the quick brown fox jumps over {n * 7 % 13} lazy dogs.\n\n" for n in range(400))
    )
    build_dataset(str(text), folder / "data" / "text", vocab_size=300)
    pairs = folder / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "answer": f"It is {n}."}) + "\n" for n in range(32))
    )
    build_dataset(str(pairs), folder / "data" / "pairs", tokenizer=folder / "data" / "text" / "tokenizer")
    preferences = folder / "preferences.jsonl"
    preferences.write_text(
        "".join(
            json.dumps({"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea."}) + "\n"
            for n in range(48)
        )
    )
    build_dataset(str(preferences), folder / "data" / "preferences", tokenizer=folder / "data" / "text" / "tokenizer")
    return folder


@pytest.fixture
def run(home: Path, ray_cluster: LocalCluster) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def start(name: str, **changes: Any) -> Driver:
        job = home / "jobs" / name
        if not (job / "config.yaml").exists():
            config = {
                "name": name, "data": {"path": str(home / "data" / "text"), "sequence_length": 32}, "model": MODEL,
                "parallel": {"workers": 2}, "steps": 10, "batch_size": 4,
                "checkpoint": {"every_steps": 5}, "optimizer": {"learning_rate": 0.01}, **changes,
            }  # fmt: skip
            job.mkdir(parents=True, exist_ok=True)
            (job / "config.yaml").write_text(yaml.safe_dump(config))
        drivers.append(Driver(job, home, ray_cluster.address))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()


def losses(home: Path, name: str) -> dict[int, float]:
    """The loss of each step of a job; of a repeated step, the last."""
    return {e["step"]: e["loss"] for e in codec.read(home / "jobs" / name / "events.jsonl") if e["event"] == "step"}


@pytest.fixture(scope="module")
def base(home: Path, ray_cluster: LocalCluster) -> str:
    """A pretrained model's registered id; its job is named `base`."""
    job = home / "jobs" / "base"
    job.mkdir(parents=True)
    config = {
        "name": "base", "data": {"path": str(home / "data" / "text"), "sequence_length": 32}, "model": MODEL,
        "parallel": {"workers": 2}, "steps": 10, "batch_size": 4, "checkpoint": {"every_steps": 5},
        "optimizer": {"learning_rate": 0.01},
    }  # fmt: skip
    (job / "config.yaml").write_text(yaml.safe_dump(config))
    driver = Driver(job, home, ray_cluster.address)
    status, found = driver.end()
    assert status == 0, "".join(driver.lines[-40:])
    return str(found[-1]["model"])


def test_pretraining_registers_a_model_and_writes_plot_and_events(home: Path, base: str):
    job = home / "jobs" / "base"
    found = list(codec.read(job / "events.jsonl"))
    assert [e["event"] for e in found if e["event"] != "step"] == ["started", "checkpoint", "checkpoint", "finished"]
    assert found[0]["workers"] == 2 and found[0]["parameters"] == found[0]["trainable"] > 0
    assert found[0]["resumed_from"] is None
    assert sorted(losses(home, "base")) == list(range(1, 11))
    assert losses(home, "base")[10] < losses(home, "base")[1] - 0.5
    assert (job / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in folders.list_complete(job / "checkpoints")] == ["step-00000005", "step-00000010"]
    assert not (job / ".ray").exists()
    steps = [e for e in found if e["event"] == "step"]
    assert all(0 < e["mfu"] < 2 and e["memory_bytes"] > 2**26 for e in steps)
    assert found[-1]["tokens"] == steps[-1]["tokens"] == 10 * 4 * 32
    told = stored_metrics.tensorboard(job / "tensorboard")
    assert [step for step, _ in told["train/loss"]] == list(range(1, 11))
    assert dict(told["train/loss"]) == pytest.approx(losses(home, "base"), rel=1e-5)
    record = Registry(f"sqlite:///{home}/tandem.db").resolve("base")
    assert (record.id, record.path, record.max_length) == (base, job / "export", 64)
    assert record.lineage["job"] == "base" and record.lineage["steps"] == 10


def test_a_finished_job_run_again_ends_at_once(home: Path, base: str, run: Callable[..., Driver]):
    status, found = run("base").end()
    assert status == 0
    assert [e["event"] for e in found] == ["finished"] and found[0]["model"] == base


def test_an_adapter_is_trained_on_answers_and_loads_in_peft(home: Path, base: str, run: Callable[..., Driver]):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    driver = run(
        "tuned",
        data={"path": str(home / "data" / "pairs"), "sequence_length": 48},
        model={"base": "base"},
        lora={"rank": 4},
        checkpoint={"every_steps": 4, "exports": 2},
    )
    status, found = driver.end()
    assert status == 0, "".join(driver.lines[-40:])
    assert found[0]["trainable"] < found[0]["parameters"] and found[0]["kind"] == "sft"
    registry = Registry(f"sqlite:///{home}/tandem.db")
    record = registry.resolve("tuned")
    assert (record.kind, record.base, record.rank) == ("adapter", base, 4)
    # Its checkpoints are versions before it.
    assert record.id == "tuned@3" and [v.lineage["steps"] for v in registry.versions("tuned")] == [4, 8, 10]
    checkpoint = registry.resolve("tuned@2")
    assert checkpoint.lineage["loss"] > record.lineage["loss"] and checkpoint.digest != record.digest
    assert json.loads((record.path / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "jobs" / "base" / "export"), record.path)


@pytest.mark.slow  # two jobs for each layout
@pytest.mark.parametrize(
    ("name", "parallel", "lora"),
    [
        ("tensor", {"tensor": 2}, None),
        ("pipeline", {"pipeline": 2, "schedule": "interleaved"}, None),
        ("pipeline-lora", {"pipeline": 2}, {"rank": 4}),
    ],
)
def test_each_layout_trains_evaluates_resumes_and_exports(
    home: Path, base: str, run: Callable[..., Driver], name: str, parallel: dict[str, Any], lora: dict[str, Any] | None
):
    import torch
    from transformers import AutoModelForCausalLM

    model = {"model": {"base": "base"}} if lora else {"model": {**MODEL, "num_layers": 4}}
    settings = {"parallel": {"workers": 2, **parallel}, "evaluation": {"every_steps": 5, "held_out": 0.1, "rows": 6}}
    whole = {**settings, **model, "lora": lora, "accumulate": 4, "register": False, "steps": 60}
    driver = run(name, **whole, checkpoint={"every_steps": 5})
    # Ended after the first checkpoint, and started again.
    driver.wait_for(lambda e: e["event"] == "checkpoint")
    driver.end_abruptly()
    status, found = run(name).end()
    assert status == 0, found
    assert found[0]["event"] == "started" and 5 <= found[0]["resumed_from"] < 60
    assert f"{next(iter(parallel))} 2" in found[0]["layout"]
    end = found[-1]
    assert end["steps"] == 60 and end["evaluation"]["loss"] > 0
    if lora is None:
        loaded = AutoModelForCausalLM.from_pretrained(end["path"])
        logits = loaded(torch.arange(8)[None]).logits
        assert loaded.config.num_hidden_layers == 4 and torch.isfinite(logits).all()


@pytest.mark.slow  # a job of its own
def test_dpo_trains_and_evaluates_on_held_out_pairs(home: Path, base: str, run: Callable[..., Driver]):
    driver = run(
        "preferred",
        objective="dpo",
        data={"path": str(home / "data" / "preferences"), "sequence_length": 48},
        model={"base": "base"},
        evaluation={"every_steps": 5, "held_out": 0.25, "rows": 8},
        ema=0.9,
    )
    status, found = driver.end()
    assert status == 0, "".join(driver.lines[-40:])
    assert found[0]["kind"] == "dpo"
    evaluations = [e for e in found if e["event"] == "evaluation"]
    assert [e["step"] for e in evaluations] == [5, 10] and all(e["averaged"] for e in evaluations)
    assert evaluations[1]["loss"] < evaluations[0]["loss"] and evaluations[1]["reward_margin"] > 0
    assert found[-1]["evaluation"] == {key: evaluations[1][key] for key in ("loss", "reward_margin", "reward_accuracy")}
    steps = [e for e in found if e["event"] == "step"]
    assert set(steps[0]["metrics"]) == {"reward_margin", "reward_accuracy"}
    # A row is 48 tokens of chosen answers and 48 of rejected ones.
    assert steps[0]["tokens"] == 4 * 2 * 48
    record = Registry(f"sqlite:///{home}/tandem.db").resolve("preferred")
    assert (record.kind, record.lineage["evaluation"]) == ("model", found[-1]["evaluation"])


@pytest.mark.slow  # a job of its own, with DeepSpeed
def test_deepspeed_trains_like_fsdp2(home: Path, base: str, run: Callable[..., Driver]):
    driver = run("zero", parallel={"workers": 2, "strategy": "deepspeed"}, deepspeed={"stage": 3})
    status, found = driver.end()
    assert status == 0, "".join(driver.lines[-40:])
    assert losses(home, "zero") == pytest.approx(losses(home, "base"), abs=1e-5)
    assert [e["step"] for e in found if e["event"] == "checkpoint"] == [5, 10]
    assert (Path(found[-1]["path"]) / "model.safetensors").exists()


@pytest.mark.slow  # three jobs
def test_an_extended_job_has_the_losses_of_one_longer_run(home: Path, run: Callable[..., Driver]):
    constant = {"learning_rate": 0.01, "schedule": "constant"}
    for name, steps in (("short", 6), ("long", 10)):
        status, _ = run(name, steps=steps, optimizer=constant, checkpoint={"every_steps": 0}).end()
        assert status == 0
    extended = to_dict(extension_of(JobFolder(home / "jobs" / "short"), 4))
    driver = run("extended", **{key: value for key, value in extended.items() if value is not None and key != "name"})
    status, found = driver.end()
    assert status == 0, "".join(driver.lines[-40:])
    assert next(e for e in found if e["event"] == "started")["resumed_from"] == 6
    whole = losses(home, "long")
    assert losses(home, "extended") == pytest.approx({step: whole[step] for step in (7, 8, 9, 10)}, abs=1e-6)
    record = Registry(f"sqlite:///{home}/tandem.db").resolve("extended")
    assert record.lineage["extends"] == "short" and record.lineage["steps"] == 10
    # The job that was extended is as it was.
    assert folders.latest(home / "jobs" / "short" / "checkpoints").name == "step-00000006"


@pytest.mark.slow  # a job, twice
def test_a_job_resumes_from_its_checkpoint_after_its_driver_was_killed(
    home: Path, base: str, run: Callable[..., Driver]
):
    first = run("stopped", steps=10, checkpoint={"every_steps": 5})
    first.wait_for(lambda e: e["event"] == "checkpoint")
    first.end_abruptly()
    status, found = run("stopped").end()
    assert status == 0
    started = next(e for e in found if e["event"] == "started")
    assert started["resumed_from"] in (5, 10)
    # Same seed, same data, same shape: the run that was not stopped is `base`.
    # What the workers told while no driver listened is not in the journal; what is there agrees.
    told, undisturbed = losses(home, "stopped"), losses(home, "base")
    assert len(told) >= 5 and told == pytest.approx({step: undisturbed[step] for step in told}, abs=1e-5)


@pytest.mark.slow  # a job, twice
def test_a_damaged_checkpoint_is_reported_and_the_run_resumes_from_the_previous_one(
    home: Path, base: str, tmp_path: Path, run: Callable[..., Driver]
):
    kept = {"every_steps": 3, "path": str(tmp_path), "best": "evaluation_loss"}
    first = run("damaged", steps=200, checkpoint=kept, evaluation={"every_steps": 3, "held_out": 0.25, "rows": 8})
    first.wait_for(lambda e: e["event"] == "checkpoint" and e["step"] >= 9)
    first.end_abruptly()
    root = tmp_path / "damaged"
    before, newest = folders.list_complete(root)[-2:]
    file = next(newest.glob("__*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "evaluation_loss" in folders.read_state(before).metrics
    again = run("damaged")
    notice = again.wait_for(lambda e: e["event"] == "notice")
    assert f"{newest} is damaged: {file.name} has other bytes than were written" in notice["message"]
    started = again.wait_for(lambda e: e["event"] == "started")
    assert started["resumed_from"] == folders.step_of(before)
    again.process.kill()
    again.process.wait()


def test_an_unwritable_checkpoint_path_is_refused_before_workers_start(home: Path, run: Callable[..., Driver]):
    (home / "jobs" / "file").mkdir(parents=True)
    (home / "jobs" / "file" / "checkpoints").write_text("a file where a folder must be")
    status, found = run("file", steps=5).end()
    assert status == 1
    assert [e["event"] for e in found] == ["failed"] and "checkpoints is a file" in found[-1]["error"]


@pytest.mark.slow  # a job three times
def test_a_run_resumed_with_other_workers_continues_at_the_next_row(home: Path, run: Callable[..., Driver]):
    # Some epochs of a mixture, so that both datasets begin again at places of their own.
    mixture = [
        {"path": str(home / "data" / "text"), "weight": 2},
        {"path": str(home / "data" / "pairs"), "weight": 0.7},
    ]
    settings = {"data": {"mixture": mixture, "sequence_length": 32}, "steps": 90, "register": False}
    status, _ = run("undisturbed", **settings, parallel={"workers": 1}).end()
    assert status == 0
    resumed: list[int] = []
    for workers, until in ((2, 25), (1, 60), (2, 90)):
        job = home / "jobs" / "moved"
        if (job / "config.yaml").exists():
            config = yaml.safe_load((job / "config.yaml").read_text())
            (job / "config.yaml").write_text(yaml.safe_dump({**config, "parallel": {"workers": workers}}))
        driver = run("moved", **settings, parallel={"workers": workers})
        started = driver.wait_for(lambda e: e["event"] == "started")
        assert started["workers"] == workers
        resumed.append(started["resumed_from"] or 0)
        if until == 90:
            break
        driver.wait_for(lambda e, until=until: e["event"] == "step" and e["step"] >= until)
        driver.end_abruptly()
    status, _ = driver.end()
    assert status == 0, "".join(driver.lines[-40:])
    told, expected = losses(home, "moved"), losses(home, "undisturbed")
    # Checkpoints are 5 steps apart, and workers may make another one before they notice that their driver is gone; what they
    # tell then is in no journal.
    assert resumed[0] == 0 and resumed[1] >= 20 and 55 <= resumed[2] < 90
    assert set(told) >= {*range(1, 21), *range(resumed[1] + 1, 56), *range(resumed[2] + 1, 91)}
    assert told == pytest.approx({step: expected[step] for step in told}, abs=1e-5)
    # And the place in the data is the same to the row.
    ends = [
        folders.read_state(folders.step_folder(home / "jobs" / name / "checkpoints", 90)).cursor
        for name in ("undisturbed", "moved")
    ]
    assert ends[0] == ends[1]
    assert ends[0]["walk"]["rows"] == 90 * 4 and ends[0]["walk"]["datasets"][1]["epoch"] > 0


@pytest.mark.slow  # a job that fails
def test_a_store_that_denies_access_fails_the_job_at_once(home: Path, run: Callable[..., Driver]):
    (home / "jobs" / "refused" / "checkpoints").mkdir(parents=True)
    (home / "jobs" / "refused" / "checkpoints" / "step-00000005").write_text("a file where a checkpoint must be")
    driver = run("refused", steps=5, faults={"storage_retry_s": 0})
    status, found = driver.end()
    assert status == 1
    assert found[-1]["event"] == "failed" and "step-00000005 is a file" in found[-1]["error"]
    assert sum(e["event"] == "started" for e in found) == 1


@pytest.mark.slow  # a job that fails
def test_a_full_disk_of_the_driver_is_reported(home: Path, run: Callable[..., Driver]):
    (home / "jobs" / "full").mkdir(parents=True)
    (home / "jobs" / "full" / "events.jsonl").symlink_to("/dev/full")
    driver = run("full", steps=5)
    status, found = driver.end()
    assert status == 1
    assert found[-1]["event"] == "failed" and "disk is full while writing events" in found[-1]["error"]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("many", {"parallel": {"workers": 64}, "batch_size": 64}, "64 workers of 1 CPU each"),
        ("nobase", {"model": {"base": "bse"}, "lora": {"rank": 4}}, "bse"),
        ("nodata", {"data": {"path": "missing"}}, "No dataset 'missing': there is neither"),
        ("short", {"data": {"path": "pairs", "sequence_length": 8}}, "no usable row"),
        ("kinds", {"data": {"path": "preferences", "sequence_length": 48}}, "holds preferences"),
    ],
)
def test_an_impossible_config_fails_before_a_worker_starts(
    name: str, changes: dict[str, Any], said: str, base: str, run: Callable[..., Driver]
):
    status, found = run(name, **changes).end()
    assert status != 0
    assert [e["event"] for e in found] == ["failed"] and said in found[0]["error"]
