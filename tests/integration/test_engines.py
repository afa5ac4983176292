"""What vLLM offers beyond one plain engine, run for real where its CPU build can: each answers as one plain engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import greedy_tokens, write_model

LONG = "the cat sat on the mat and the dog ran over the hill " * 12
"""More tokens than the chunks of the case with chunked prefill, and more than one block of the cache."""
TOKENS = 12
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"top_p": 0.9, "top_k": 5},
    {"min_p": 0.05},
    {"seed": 3, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"logprobs": 3, "temperature": 0.0},
    {"n": 3, "logprobs": 1},
    {"prompt": ["the cat", "a dog"], "temperature": 0.7},
    {"prompt_logprobs": 1},
    {"structured_outputs": {"regex": "[a-z]{4}"}},
)
SAMPLED = [{"prompt": "the cat sat", "max_tokens": 4, **kind} for kind in KINDS]
"""Each kind of request, as the first of its kind that an engine gets."""
PROMPTS = ("the cat sat on the mat", LONG, LONG)
ROUNDED = {"int8": 0.85, "fp8_cache": 0.7}
"""Cases that round, with the share of places where the likeliest next token must still be that of Hugging Face."""

QUICK = ("tensor", "ngram", "chunked")
ARGS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "data": {"data_parallel_size": 2},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 4,
        },
    },
    "draft": {"speculative_config": {"method": "draft_model", "model": "DRAFT", "num_speculative_tokens": 2}},
    "chunked": {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_chunked_prefill": True},
    "int8": {},
    "fp8_cache": {"kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engines") / "tiny")


@pytest.fixture(scope="module")
def expected(base: Path) -> list[list[int]]:
    """What Hugging Face generates for each prompt."""
    found = {prompt: greedy_tokens(base, None, prompt, TOKENS) for prompt in set(PROMPTS)}
    return [found[prompt] for prompt in PROMPTS]


def run(base: Path, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The answers of each case's engine; the engines start one after another in one process."""
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": TOKENS, "return_token_ids": True} for prompt in PROMPTS
    ]
    requests.append({"prompt": LONG, "max_tokens": 1, "prompt_logprobs": 1})
    draft = str(base)
    cases = {}
    for name in names:
        path = int8_of(base, folder / "int8") if name == "int8" else base
        args = json.loads(json.dumps(ARGS[name]).replace("DRAFT", draft))
        cases[name] = {"spec": {"path": str(path), "args": args}, "requests": requests, "sampled": SAMPLED}
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("engine_world.py")
    with (folder / "log").open("w") as log:
        subprocess.run(
            [sys.executable, str(script), str(folder / "cases.json"), str(folder / "results.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            # An empty cache of compiled code, so that a case can tell when it is filled.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
            timeout=90 * len(names) + 60,
            check=False,
        )
    results = folder / "results.json"
    assert results.exists(), (folder / "log").read_text()[-4000:]
    found: dict[str, Any] = json.loads(results.read_text())
    for name in names:
        assert "answers" in found.get(name, {}), (found.get(name), (folder / "log").read_text()[-4000:])
    return found


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in result["answers"][: len(PROMPTS)]]


def metric(result: dict[str, Any], name: str) -> float:
    lines = result["metrics"].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@pytest.fixture(scope="module")
def quick(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(base, QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def rest(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(base, tuple(name for name in ARGS if name not in QUICK), tmp_path_factory.mktemp("rest"))


def int8_of(base: Path, folder: Path) -> Path:
    """The same model with 8-bit weights, a scale for each output, as compressed-tensors writes it."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if "_proj." not in name:
            tensors[name] = tensor
            continue
        scale = tensor.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = torch.round(tensor / scale).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_it_answers_as_hugging_face_does(name: str, quick: dict[str, Any], expected: list[list[int]]) -> None:
    assert tokens(quick[name]) == expected


def test_nothing_is_compiled_once_an_engine_is_ready(quick: dict[str, Any]) -> None:
    # The first case began with an empty cache.
    assert any(name.endswith(".so") for name in quick[QUICK[0]]["compiled"])
    for name, result in quick.items():
        # vLLM has no min_p beside speculation.
        refused = [kind for kind, status in zip(KINDS, result["sampled"], strict=True) if status != 200]
        assert refused == ([{"min_p": 0.05}] if name == "ngram" else []), (name, refused)
        assert not result["made"], (name, result["made"])


def test_a_prompt_that_was_seen_before_is_not_computed_again(quick: dict[str, Any]) -> None:
    for result in quick.values():
        assert metric(result, "vllm:prefix_cache_hits_total") >= 128


def test_speculated_tokens_are_taken(quick: dict[str, Any]) -> None:
    assert metric(quick["ngram"], "vllm:spec_decode_num_draft_tokens_total") > 0


@pytest.mark.slow  # four more starts of vLLM, shared with the test beside it
@pytest.mark.parametrize("name", ["data", "draft"])
def test_more_layouts_answer_as_hugging_face_does(name: str, rest: dict[str, Any], expected: list[list[int]]) -> None:
    assert tokens(rest[name]) == expected


@pytest.mark.slow  # four more starts of vLLM, shared with the test beside it
@pytest.mark.parametrize("name", ROUNDED)
def test_a_rounded_engine_agrees_with_hugging_face_nearly_everywhere(
    name: str, rest: dict[str, Any], base: Path
) -> None:
    places = rest[name]["answers"][-1]["choices"][0]["prompt_logprobs"][1:]
    said = [int(next(token for token, found in place.items() if found["rank"] == 1)) for place in places]
    likeliest = likeliest_tokens(base, LONG)
    agreed = sum(a == b for a, b in zip(said, likeliest, strict=True)) / len(said)
    assert ROUNDED[name] <= agreed < 1.0


def likeliest_tokens(base: Path, prompt: str) -> list[int]:
    """The likeliest next token after each of a prompt's but the last, by Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return [int(token) for token in model(ids).logits[0, :-1].argmax(-1)]
