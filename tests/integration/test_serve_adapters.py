"""Adapters of the served app: promotions under load, bad files, memory beyond the slots, pins, and the operator's routes."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file
from serve_fixtures import ADMIN_TOKEN, PROMPTS, Served, greedy_tokens, write_adapter, write_model

from tandem.errors import AdapterError

TOKENS = 24
LONG = 160
PROMPT = PROMPTS[2]


def tokens(served: Served, model: str, prompt: str = PROMPT, count: int = TOKENS) -> list[int]:
    answer = served.client().completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0, extra_body={"return_token_ids": True}
    )
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


def wait_for(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


@pytest.fixture
def versions(served: Served, tmp_path: Path) -> Any:
    """Two folders of adapters that answer differently, and their names are gone again after the test."""
    folders = [write_adapter(tmp_path / f"v{seed}", served.base, seed=seed) for seed in (21, 22)]
    yield folders
    for record in served.registry().list("adapter"):
        if record.name.startswith("t-"):
            served.registry().remove(record.name)


def test_a_promotion_under_load_fails_nothing_mixes_nothing_and_holds_from_the_next_request_on(
    served: Served, versions: list[Path]
) -> None:
    registry = served.registry()
    registry.register_adapter("t-moving", versions[0], base="tiny")
    registry.register_adapter("t-moving", versions[1], base="tiny", promote=False)
    expected = {
        f"t-moving@{number}": greedy_tokens(served.base, folder, PROMPT, LONG)
        for number, folder in enumerate(versions, 1)
    }
    assert expected["t-moving@1"][:4] != expected["t-moving@2"][:4]
    promotions: list[tuple[float, float]] = []
    done: list[tuple[float, float, str, list[int]]] = []

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="test", timeout=120, max_retries=0)
        over = asyncio.Event()

        async def ask(count: int) -> None:
            while not over.is_set():
                sent, seen, model = time.monotonic(), [], ""
                stream = await client.completions.create(
                    model="t-moving",
                    prompt=PROMPT,
                    max_tokens=count,
                    temperature=0,
                    stream=True,
                    extra_body={"return_token_ids": True, "ignore_eos": True},
                )
                async for chunk in stream:
                    model = chunk.model
                    seen += chunk.choices[0].token_ids or [] if chunk.choices else []  # type: ignore[attr-defined]
                done.append((sent, time.monotonic(), model, seen))

        async def move() -> None:
            # Forth, back and forth again: blocks of each version are in the prefix cache by then.
            for step in (lambda: registry.promote("t-moving@2"), lambda: registry.roll_back("t-moving")):
                await asyncio.sleep(3.0)
                began = time.monotonic()
                await asyncio.to_thread(step)
                promotions.append((began, time.monotonic()))
            await asyncio.sleep(3.0)
            over.set()

        await asyncio.gather(move(), *(ask(LONG if i % 2 else 8) for i in range(6)))

    asyncio.run(run())
    (first, first_done), (second, second_done) = promotions
    for sent, ended, model, seen in done:
        # Hugging Face stops at the end of the text, and these requests do not.
        same = min(len(seen), len(expected[model]))
        assert len(seen) in (8, LONG) and same >= 8, model
        assert seen[:same] == expected[model][:same], model
        # What was sent while a promotion was under way may be of either.
        if min(sent + 2.0, ended) < first or sent > second_done:
            assert model == "t-moving@1"
        elif sent > first_done and min(sent + 2.0, ended) < second:
            assert model == "t-moving@2"
    assert {model for _, _, model, _ in done} == set(expected)
    assert any(sent < first < ended for sent, ended, _, _ in done), "no request was in flight"


def test_memory_holds_more_adapters_than_slots_and_a_batch_with_the_base_is_right(
    served: Served, versions: list[Path]
) -> None:
    registry = served.registry()
    folders = {"red": served.adapters["red"], "t-one": versions[0], "t-two": versions[1], "tiny": None}
    for name in ("t-one", "t-two"):
        registry.register_adapter(name, folders[name], base="tiny")
    expected = {name: greedy_tokens(served.base, folder, PROMPT, TOKENS) for name, folder in folders.items()}
    for name in (*expected, *expected):
        assert tokens(served, name) == expected[name]
    # Slots: two. Whatever was moved in and out of them, the base in a batch with adapters is still the base.
    for pair in (("red", "t-one"), ("t-two", "red"), ("t-one", "t-two")):
        jobs = [*pair, "tiny"] * 3
        with ThreadPoolExecutor(len(jobs)) as pool:
            assert list(pool.map(lambda name: tokens(served, name), jobs)) == [expected[name] for name in jobs]
    wait_for(lambda: len(served.replicas()[0].slots) == 2)
    assert {"red@1", "t-one@1", "t-two@1"} <= set(served.replicas()[0].adapters)


def spoil(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    match how:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickle":
            weights.rename(folder / "adapter_model.bin")
        case "changed":
            save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
        case "gone":
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "not a safetensors file"),
        ("pickle", "adapter_model.bin, a pickle"),
        ("changed", "have changed since it was registered"),
        ("gone", "There is no folder"),
    ],
)
def test_files_that_went_bad_are_400_with_the_reason_and_disturb_nobody(
    served: Served, versions: list[Path], how: str, said: str
) -> None:
    served.registry().register_adapter("t-bad", versions[0], base="tiny")
    spoil(versions[0], how)
    alone = tokens(served, "red", count=LONG)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(tokens, served, "red", PROMPT, LONG) for _ in range(3)]
        for _ in range(5):
            with pytest.raises(openai.BadRequestError) as caught:
                tokens(served, "t-bad")
            assert caught.value.code == "adapter_refused" and said in caught.value.message
        assert [other.result() for other in others] == [alone] * 3


def test_what_vllm_itself_refuses_is_400_too_and_leaves_nothing_behind(served: Served, versions: list[Path]) -> None:
    weights = versions[0] / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.norm.lora_{}.weight"
    width = next(value.shape[1] for key, value in tensors.items() if "lora_A" in key)
    shapes = {name.format("A"): (8, width), name.format("B"): (width, 8)}
    save_file(tensors | {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, weights)
    served.registry().register_adapter("t-odd", versions[0], base="tiny")
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match=r"vLLM could not load the adapter t-odd@1.*norm"):
            tokens(served, "t-odd")
    assert tokens(served, "red") == greedy_tokens(served.base, served.adapters["red"], PROMPT, TOKENS)
    assert "t-odd@1" not in served.replicas()[0].adapters


def test_a_pinned_adapter_is_loaded_without_a_request_and_follows_its_name(
    served: Served, versions: list[Path]
) -> None:
    registry = served.registry()
    registry.register_adapter("t-kept", versions[0], base="tiny")
    registry.pin("t-kept")
    wait_for(lambda: "t-kept@1" in served.replicas()[0].adapters)
    registry.register_adapter("t-kept", versions[1], base="tiny")
    wait_for(lambda: "t-kept@2" in served.replicas()[0].adapters)
    for folder in versions:
        spoil(folder, "gone")
    # Its files are needed no more.
    assert tokens(served, "t-kept") == tokens(served, "t-kept@2")


def test_an_operator_does_it_all_over_http_and_sees_where_adapters_are(served: Served, versions: list[Path]) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        assert client.get("/admin/residency").status_code == 401
        client.headers["authorization"] = f"Bearer {ADMIN_TOKEN}"
        for folder in versions:
            body = {"name": "t-run", "source": str(folder), "base": "tiny", "promote": False}
            assert client.post("/admin/adapters", json=body).status_code == 201
        assert (
            client.post("/v1/completions", json={"model": "t-run", "prompt": "x", "max_tokens": 1}).status_code == 404
        )
        for number in (1, 2):
            assert client.post(f"/admin/adapters/t-run@{number}/promote").status_code == 200
            assert client.post("/v1/completions", json={"model": "t-run", "prompt": "x", "max_tokens": 1}).json()[
                "model"
            ] == (f"t-run@{number}")
        assert client.post("/admin/adapters/t-run/roll-back").json()["id"] == "t-run@1"
        refused = client.post("/admin/adapters", json={"name": "t-no", "source": str(served.base), "base": "tiny"})
        assert refused.status_code == 400 and "adapter_config.json" in refused.text

        def told() -> bool:
            (replica,) = client.get("/admin/residency").json()["data"]
            return replica["base"] == "tiny@1" and {"t-run@1", "t-run@2"} <= set(replica["in_memory"])

        # What a replica loads reaches its gateway with the directory's next snapshot.
        wait_for(told)
        assert json.dumps(client.get("/admin/adapters/t-run").json()["promotions"]).count("t-run@") == 2
        assert client.delete("/admin/adapters/t-run").json() == {"deleted": ["t-run@1", "t-run@2"]}


def test_an_adapter_that_peft_made_elsewhere_for_another_model_is_refused_at_registration(
    served: Served, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", hidden=64)
    folder = write_adapter(tmp_path / "foreign", other, seed=1)
    assert (folder / "README.md").exists()
    with pytest.raises(AdapterError, match="It was made for another model"):
        served.registry().register_adapter("t-foreign", folder, base="tiny")
