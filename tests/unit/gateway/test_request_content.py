"""Templates, tensors and URLs in requests: refused unless the config allows them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from overload_world import Listening, overload_world

from tandem.config import GatewayConfig
from tandem.config.serving.app import GUARDED_FIELDS
from tandem.errors import ConfigError
from tandem.gateway.errors import ApiError
from tandem.gateway.requests import request_content
from tandem.gateway.requests.request_content import check_content, is_allowed

CHAT = "/v1/chat/completions"
DATA = "data:image/png;base64,iVBORw0KGgo="


def refused(body: dict[str, Any], allow: tuple[str, ...] = (), hosts: tuple[str, ...] = ()) -> str | None:
    """The field that is refused; None: the body passes."""
    try:
        check_content(body, json.dumps(body).encode(), allow, hosts)
    except ApiError as error:
        assert error.status == 400 and error.param and f"`{error.param}`" in error.message
        assert "10.0.0.7" not in error.message
        return error.param
    return None


def chat(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize("field", GUARDED_FIELDS)
def test_guarded_fields_are_refused_by_name_unless_allowed(field: str) -> None:
    body = {"prompt": "x", field: {"a": 1}}
    assert refused(body) == field
    assert refused(body, (field,)) is None
    assert refused({"prompt": "x", field: None}) is None and refused({"prompt": "x", field: {}}) is None


def test_tensors_in_a_message_are_refused_too() -> None:
    part = {"type": "image_embeds", "image_embeds": "AAAA"}
    assert refused(chat({"type": "text", "text": "x"}, part)) == "messages.1.content.1.image_embeds"
    assert refused(chat({"prompt_embeds": "AAAA"})) == "messages.1.content.0.prompt_embeds"
    assert refused(chat(part), ("image_embeds",)) is None


INNER = "http://10.0.0.7:8080/admin"
URLS: list[tuple[dict[str, Any], str]] = [
    (chat({"type": "image_url", "image_url": {"url": INNER}}), "messages.1.content.0.image_url"),
    (chat({"type": "image_url", "image_url": INNER}), "messages.1.content.0.image_url"),
    (chat({"image_url": INNER}), "messages.1.content.0.image_url"),
    (chat({"type": "audio_url", "audio_url": {"url": INNER}}), "messages.1.content.0.audio_url"),
    (chat({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}), "messages.1.content.0.video_url"),
    (chat({"type": "image", "source": {"type": "url", "url": INNER}}), "messages.1.content.0.source"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": INNER}]}]},
        "input.0.content.0.image_url",
    ),
    ({"input": [{"type": "input_file", "file_url": INNER}]}, "input.0.file_url"),
    ({"input": "x", "tools": [{"type": "mcp", "server_url": INNER}]}, "tools.0.server_url"),
    ({"system": [{"type": "image", "source": {"type": "url", "url": INNER}}], "messages": []}, "system.0.source"),
    ({"query": {"content": [{"image_url": {"url": INNER}}]}, "documents": ["a"]}, "query.content.0.image_url"),
    ({"text_1": "a", "text_2": [{"content": [{"image_url": {"url": INNER}}]}]}, "text_2.0.content.0.image_url"),
]


@pytest.mark.parametrize(("body", "param"), URLS)
def test_a_url_of_another_host_is_refused_wherever_an_api_has_one(body: dict[str, Any], param: str) -> None:
    assert refused(body) == param
    assert refused(json.loads(json.dumps(body).replace(INNER, DATA).replace("file:///etc/passwd", DATA))) is None
    assert refused(json.loads(json.dumps(body).replace("file:///etc/passwd", INNER)), hosts=("10.0.0.7:8080",)) is None


@pytest.mark.parametrize("last", [{"image_url": INNER}, {"prompt_embeds": "AAAA"}, {"text": "x"}])
def test_a_deep_value_with_long_keys_takes_no_memory_for_each_path(last: dict[str, Any]) -> None:
    documents: Any = [{} for _ in range(20_000)] + [last]
    for level in range(20):
        documents = {f"{level}" * 5000: documents}
    raw = json.dumps(documents).encode()
    tracemalloc.start()
    found = None
    try:
        check_content({"query": "x", "documents": documents}, raw, (), ())
    except ApiError as error:
        found = error
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10 * 2**20
    assert (found is None) == ("text" in last)
    if found is not None:
        assert (found.param or "").startswith("documents.1919") and len(found.message) < 1000


def test_a_key_in_another_form_of_json_is_found() -> None:
    body = chat({"type": "image_url", "image_url": {"url": INNER}})
    with pytest.raises(ApiError):
        check_content(body, json.dumps(body).replace("url", "\\u0075rl").encode(), (), ())


def test_long_texts_are_walked_and_many_short_ones_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[str] = []
    monkeypatch.setattr(request_content, "_check", lambda name, *rest: walked.append(name))
    for count, text in ((1, "x" * 4000), (4, "x" * 1000), (100, "x" * 10)):
        walked.clear()
        assert refused({"messages": [{"role": "user", "content": text} for _ in range(count)]}) is None
        assert walked == ([] if count == 100 else ["messages"])
    # No part of it can have a URL.
    assert refused({"prompt": "image_url" * 1000}) is None and walked == []


def test_text_about_urls_and_citations_of_answers_pass() -> None:
    for body in (
        {"messages": [{"role": "user", "content": f"What is at {INNER}? image_url"}]},
        chat({"type": "text", "text": f'{{"image_url": "{INNER}"}}'}),
        {"input": [{"content": [{"type": "output_text", "annotations": [{"type": "url_citation", "url": INNER}]}]}]},
        {"messages": [], "tools": [{"function": {"parameters": {"properties": {"image_url": {"type": "string"}}}}}]},
        {"prompt": ["image_url", INNER]},
    ):
        assert refused(body) is None


HOSTS = ("images.example.com", "cdn.example.com:8443")


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.com/a.png",
        "http://IMAGES.example.com:80/a.png?x=1#y",
        "https://images.example.com:443",
        "https://cdn.example.com:8443/a",
        DATA,
        "DATA:text/plain,x",
    ],
)
def test_urls_of_listed_hosts_and_data_pass(url: str) -> None:
    assert is_allowed(url, HOSTS)


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.com.evil.org/a",
        "https://evil.org/images.example.com",
        "https://images.example.com@evil.org/",
        "https://evil.org\\@images.example.com/",
        "https://images.example.com\\.evil.org/",
        "https://images.example.com:8080/",
        "https://cdn.example.com/a",
        "https:images.example.com/",
        "//images.example.com/a",
        " https://images.example.com/",
        "https://images.example.com/a b",
        "https://images.example.com/\r\nhost: evil.org",
        "https://images.example\u3002com/",
        "ftp://images.example.com/a",
        "file://images.example.com/etc/passwd",
        "",
    ],
)
def test_urls_that_could_mean_another_host_are_refused(url: str) -> None:
    assert not is_allowed(url, HOSTS)


def test_the_config_names_known_fields_and_plain_hosts() -> None:
    with pytest.raises(ConfigError, match="gateway.allow"):
        GatewayConfig(allow=("chat_templates",))
    with pytest.raises(ConfigError, match="gateway.media_hosts"):
        GatewayConfig(media_hosts=("https://images.example.com",))


async def test_a_refused_request_reaches_no_engine_and_an_allowed_one_does(tmp_path: Path) -> None:
    config = GatewayConfig(allow=("chat_template_kwargs",), media_hosts=("images.example.com",))
    async with overload_world(tmp_path, config) as world:
        engine = Listening()
        await world.add(engine)
        image = {"type": "image_url", "image_url": {"url": INNER}}
        for extra in ({"chat_template": "{{ x }}"}, chat(image)):
            answer = await world.http.post(CHAT, json={"model": "base", **chat({"type": "text", "text": "x"}), **extra})
            assert answer.status_code == 400 and not engine.asked, answer.text
        image["image_url"] = {"url": "https://images.example.com/a.png"}
        extra = {"chat_template_kwargs": {"enable_thinking": False}}
        answer = await world.http.post(CHAT, json={"model": "base", **chat(image), **extra})
        assert answer.status_code == 200, answer.text
