"""A model of the Hugging Face hub, pulled from a server that speaks its API, served and asked by its name there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import started, tandem
from fake_hub import FakeHub
from openai import OpenAI
from serve_fixtures import PROMPTS, Served, free_port, greedy_tokens, write_model

import tandem as package
from tandem.apps.build import build_app
from tandem.config import ServeConfig, ServedModelConfig
from tandem.registry import Registry

NAME = "org/tiny-model"


def upload(hub: FakeHub, folder: Path) -> None:
    hub.model(NAME, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def test_an_app_answers_to_the_name_on_the_hub(served: Served, hub: FakeHub) -> None:
    from ray import serve

    upload(hub, served.base)
    config = ServeConfig(models=(ServedModelConfig(model=NAME, engine="echo", cpus_per_replica=0.1),), app="hub")
    serve.run(build_app(config), name="hub", route_prefix="/hub")
    try:
        client = OpenAI(base_url=f"{served.url}/hub/v1", api_key="test", max_retries=0, timeout=60)
        assert [model.id for model in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).id == NAME
        said = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a b c"}])
        assert said.choices[0].message.content == "a b c"
        assert client.completions.create(model=f"{NAME}@1", prompt="d e").choices[0].text
        llm = package.LLM(NAME, base_url=f"{served.url}/hub")
        assert llm.generate(["f g"], use_tqdm=False)[0]["text"]
    finally:
        serve.delete("hub")


@pytest.mark.slow  # a job and a server of its own
def test_an_adapter_is_trained_on_it_and_both_are_served_while_only_the_commands_ask_the_hub(
    hub: FakeHub, tandem_home: Path, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model")
    upload(hub, folder)
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    rows = "".join(json.dumps({"prompt": p, "answer": "a dog and a cat"}) + "\n" for p in PROMPTS * 20)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "job.yaml").write_text(
        f"{{name: mine, data: {{path: rows, sequence_length: 64}}, model: {{base: {NAME}}}, lora: {{rank: 8}}, steps: 4, "
        "optimizer: {learning_rate: 0.1}}"
    )
    for arguments in (
        ("data", "build", str(tmp_path / "rows.jsonl"), "rows", "--tokenizer", NAME),
        ("train", "submit", "--config", str(tmp_path / "job.yaml")),
    ):
        done = tandem(*arguments, home=tandem_home, **online)
        assert done.returncode == 0, done.stdout
    base, adapter = Registry.open().resolve(NAME), Registry.open().resolve("mine")
    assert adapter.base == base.id == f"{NAME}@1"
    assert adapter.lineage["base_commit"] == f"{NAME} {hub.models[NAME].refs['main']}"
    port = free_port()
    command = [sys.executable, "-m", "tandem", "serve", "up", NAME, "--port", str(port)]
    with started(command, home=tandem_home, log=tmp_path / "log", **online) as running:
        running.wait_for("Serving at", timeout_s=300)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="test", max_retries=0, timeout=120)
        for name, lora in ((NAME, None), ("mine", adapter.path)):
            answer = client.completions.create(
                model=name, prompt=PROMPTS[0], max_tokens=8, temperature=0, extra_body={"return_token_ids": True}
            )
            assert answer.choices[0].model_dump()["token_ids"] == greedy_tokens(folder, lora, PROMPTS[0], 8)
        assert running.interrupt() == 0
    # Each of three commands asked which commit main is, and the first downloaded it. Jobs and engines have the folder.
    asked = [path for _, path, _ in hub.requests]
    assert asked.count(f"/api/models/{NAME}/revision/main") == 3
    others = [path for path in asked if not path.startswith(("/api/", "/storage/"))]
    assert sorted(others) == sorted(set(hub.downloads()))
    done = tandem("models", "pull", NAME, home=tandem_home, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url)
    assert done.returncode == 0 and len(hub.requests) == len(asked), done.stdout
