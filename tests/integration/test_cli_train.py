"""Submission of training jobs with scripts and commands, each in its own process, on a real cluster."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml
from commands import REPOSITORY, cluster_mark, cluster_record, gone, run, started, tandem

from tandem.cluster.local import LocalCluster

TINY = [
    "--set=steps=4", "--set=batch_size=4", "--set=model.hidden_size=32", "--set=model.num_layers=2", "--set=model.num_heads=1",
    "--set=model.num_kv_heads=1", "--set=model.intermediate_size=64", "--set=data.sequence_length=64", "--set=log_every=1",
]  # fmt: skip


def script(name: str, *arguments: str) -> list[str]:
    recipe = REPOSITORY / "train_apps" / "recipes" / f"quickstart_{name}.yaml"
    return [sys.executable, str(REPOSITORY / "train_apps" / f"{name}.py"), "--config", str(recipe), *arguments]


@pytest.fixture(scope="module")
def datasets(session_home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of a text. " * 20}) + "\n" for i in range(200))
    )
    pairs = [{"prompt": f"What is {i}?", "answer": f"It is {i + 1}."} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    built = tandem("data", "build", str(folder / "texts.jsonl"), "cli-text", "--vocab-size", "512", home=session_home)
    assert built.returncode == 0, built.stdout
    assert "200 texts" in built.stdout
    built = tandem(
        "data", "build", str(folder / "pairs.jsonl"), "cli-pairs", "--tokenizer", "cli-text", home=session_home
    )
    assert built.returncode == 0, built.stdout


def test_the_scripts_train_a_base_and_its_adapter_and_the_commands_list_them(
    cluster: LocalCluster, session_home: Path, datasets: None
) -> None:
    base = run(script("pretrain", *TINY, "--set=data.path=cli-text", "--set=name=cli-base"), home=session_home)
    assert base.returncode == 0, base.stdout
    assert "cli-base@1" in base.stdout
    assert re.search(r"step 4/4  loss \S+  grad norm \S+  \S+ tok/s  MFU \S+ %  \S+ GiB", base.stdout), base.stdout
    assert re.search(r"loss \S+, 1,024 tokens, ", base.stdout), base.stdout
    assert "tandem serve up cli-base\n" in base.stdout and "tandem chat --model cli-base\n" in base.stdout

    small = [a for a in TINY if "model." not in a]
    adapter = run(
        script(
            "sft", *small, "--set=data.path=cli-pairs", "--set=name=cli-adapter", "--set=model.base=cli-base",
            "--set=lora.rank=8", "--set=lora.alpha=16", "--detach",
        ),
        home=session_home,
    )  # fmt: skip
    assert adapter.returncode == 0, adapter.stdout
    job = next(line for line in adapter.stdout.splitlines() if line.startswith("Job ")).split()[1]

    logs = tandem("train", "logs", "--follow", job, home=session_home)
    assert logs.returncode == 0, logs.stdout
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 4/4  loss ", logs.stdout, re.MULTILINE), logs.stdout
    assert "@tandem" not in logs.stdout
    as_json = tandem("train", "logs", "--json", job, home=session_home)
    assert json.loads(as_json.stdout.splitlines()[-1])["event"] == "finished"

    status = tandem("train", "status", job, "--json", home=session_home)
    assert json.loads(status.stdout)["state"] == "finished"
    assert json.loads(status.stdout)["model"] == "cli-adapter@1"
    assert "cli-base-" in tandem("train", "status", home=session_home).stdout

    listed = tandem("models", "ls", home=session_home).stdout
    assert "cli-base" in listed
    assert "cli-adapter" in listed

    again = run(script("pretrain", *TINY, "--set=data.path=cli-text", "--set=name=cli-base"), home=session_home)
    assert again.returncode == 0
    assert "cli-base@1" in again.stdout
    assert "step 4/4" not in again.stdout, "a finished job is not run again"


def test_a_job_that_fails_gives_its_exit_status_and_its_reason(
    cluster: LocalCluster, session_home: Path, datasets: None, tmp_path: Path
) -> None:
    # Shards of the right size with other bytes: nothing before the job can know, the job must say it.
    broken = session_home / "data" / "cli-broken"
    run(["cp", "-r", str(session_home / "data" / "cli-text"), str(broken)], home=session_home)
    for shard in (broken / "shards").iterdir():
        shard.write_bytes(b"\x01" * shard.stat().st_size)
    failed = run(script("pretrain", *TINY, "--set=data.path=cli-broken", "--set=name=cli-fails"), home=session_home)
    assert failed.returncode not in (0, 130), failed.stdout
    assert " failed: " in failed.stdout
    # Of all of them the one that comes first in the order of the seed.
    assert ".tar is damaged: its bytes are not those" in " ".join(failed.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set=optimizer.learnin_rate=1"], "Did you mean 'learning_rate'"),
        (["--set=batch_size=three"], "batch_size is 'three' (str); it must be a whole number"),
        (["--set=parallel.workers=3", "--set=batch_size=4"], "The nearest that works is 3"),
        (["--set=data.path=cli-txt"], "No dataset 'cli-txt': there is neither"),
    ],
)
def test_a_wrong_config_is_refused_at_once(session_home: Path, arguments: list[str], said: str) -> None:
    refused = run(script("pretrain", *arguments), home=session_home)
    assert refused.returncode in (1, 2)
    assert said in refused.stdout
    assert "Traceback" not in refused.stdout


@pytest.mark.slow  # a cluster of its own for each signal
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_nothing_running_and_resumes_later(
    tmp_path: Path, datasets: None, session_home: Path, number: int
) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "cli-text").symlink_to(session_home / "data" / "cli-text")
    config = tmp_path / "long.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "name": "long",
                "data": {"path": "cli-text", "sequence_length": 64},
                "model": {
                    "hidden_size": 32,
                    "num_layers": 1,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "intermediate_size": 64,
                },
                "steps": 100_000,
                "batch_size": 2,
                "checkpoint": {"every_steps": 5},
            }
        )
    )
    command = [sys.executable, "-m", "tandem", "train", "submit", "-c", str(config)]
    with started(command, home=home, log=tmp_path / "log", PYTHONUNBUFFERED="1") as running:
        running.wait_for(lambda: any(home.glob("jobs/*/checkpoints/step-*")))
        mark = cluster_mark(home)
        status = running.interrupt(number)
    assert status == (130 if number == signal.SIGINT else 143), running.text()
    assert gone(mark) == []
    assert not cluster_record(home).exists()
    assert "Stopped" in running.text()
    assert "stopped" in tandem("train", "status", "latest", home=home).stdout
