"""Models that write nothing: vectors and scores from real engines, compared with Hugging Face's own."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from serve_fixtures import PROMPTS, Pooled

QUERY = "a cat"


def vectors(pooled: Pooled) -> np.ndarray[Any, Any]:
    """The last token's last hidden state, of length one, by Hugging Face."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(pooled.base), AutoModel.from_pretrained(pooled.base)
    made = []
    with torch.no_grad():
        for prompt in PROMPTS:
            hidden = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1]
            made.append(torch.nn.functional.normalize(hidden, dim=0).numpy())
    return np.stack(made)


def scores(pooled: Pooled) -> list[float]:
    """How well each prompt answers the query, by Hugging Face."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pooled.judge)
    model = AutoModelForSequenceClassification.from_pretrained(pooled.judge)
    with torch.no_grad():
        pairs = [tokenizer(QUERY, prompt, return_tensors="pt") for prompt in PROMPTS]
        return [float(model(input_ids=pair.input_ids).logits[0, 0].sigmoid()) for pair in pairs]


def test_embeddings_are_those_of_hugging_face_in_each_encoding(pooled: Pooled) -> None:
    client, expected = pooled.client(), vectors(pooled)
    for encoding in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="embedder", input=list(PROMPTS), **encoding)
        np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-4)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0 and answer.model == "embedder"
    raw = client.embeddings.create(model="embedder", input=PROMPTS[0], encoding_format="base64")
    coded = raw.data[0].embedding
    assert isinstance(coded, str)
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), dtype=np.float32), expected[0], atol=1e-4)


def test_scores_and_ranks_are_those_of_hugging_face(pooled: Pooled) -> None:
    expected = scores(pooled)
    with httpx.Client(base_url=pooled.url, timeout=60) as http:
        for path in ("/v1/score", "/score"):
            body = {"model": "judge", "queries": QUERY, "documents": list(PROMPTS)}
            answer = http.post(path, json=body).json()
            np.testing.assert_allclose([item["score"] for item in answer["data"]], expected, atol=1e-4)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            body = {"model": "judge", "query": QUERY, "documents": list(PROMPTS), "top_n": 2}
            results = http.post(path, json=body).json()["results"]
            best = sorted(range(len(expected)), key=lambda i: -expected[i])[:2]
            assert [result["index"] for result in results] == best
            assert results[0]["document"]["text"] == PROMPTS[best[0]]


def test_what_such_a_model_cannot_do_is_a_400_that_says_what_it_can(pooled: Pooled) -> None:
    client = pooled.client()
    with pytest.raises(openai.BadRequestError, match=r"served to generate.*/v1/embeddings"):
        client.chat.completions.create(model="embedder", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match=r"served to embed.*/v1/rerank"):
        client.embeddings.create(model="judge", input="x")
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model="embedder", input="cat " * 300)
    assert long.value.code == "context_length_exceeded" and "256" in long.value.message
    for wrong in (
        {"input": None},
        {"input": {}},
        {"input": "x", "dimensions": 7},
        {"input": "x", "encoding_format": "z"},
    ):
        answer = httpx.post(f"{pooled.url}/v1/embeddings", json={"model": "embedder", **wrong}, timeout=60)
        assert answer.status_code == 400 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_model_is_listed_once_and_its_tokens_counted(pooled: Pooled) -> None:
    assert {model.id for model in pooled.client().models.list()} == {"embedder", "judge"}
    for name in ("embedder", "judge"):
        made = httpx.post(f"{pooled.url}/tokenize", json={"model": name, "prompt": QUERY}, timeout=60).json()
        assert made["count"] > 0
