"""Batches by the `openai` SDK alone: answers, bad requests among them, cancellation, files that cannot be used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError
from serve_fixtures import Served
from typer.testing import CliRunner

from tandem.cli.main import app

TIMEOUT_S = 300.0


def request(number: int, **body: Any) -> dict[str, Any]:
    content = {"model": "tiny", "prompt": f"the cat {number}", "max_tokens": 2, "temperature": 0.0, **body}
    return {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": content}


def upload(client: Any, requests: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(each) + "\n" for each in requests).encode()
    return str(client.files.create(file=("requests.jsonl", content), purpose="batch").id)


def create(client: Any, file: str, **options: Any) -> Any:
    return client.batches.create(
        input_file_id=file, **{"endpoint": "/v1/completions", "completion_window": "24h", **options}
    )


def wait_for(look: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen within {TIMEOUT_S:g} s")


def ended(client: Any, batch: str) -> Any:
    def look() -> Any:
        found = client.batches.retrieve(batch)
        return found if found.status in ("completed", "failed", "expired", "cancelled") else None

    return wait_for(look, "the end of the batch")


def lines(client: Any, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


def test_a_batch_of_a_thousand_is_answered_whole_with_its_bad_requests_named(served: Served) -> None:
    client = served.client()
    bad = {3: {"max_tokens": -1}, 500: {"temperature": "hot"}, 999: {"n": 10**6}}
    requests = [request(number, **bad.get(number, {})) for number in range(1000)]
    # Adapters among them.
    for number in range(100, 120):
        requests[number]["body"]["model"] = "red"
    batch = create(client, upload(client, requests), metadata={"purpose": "test"})
    assert batch.status == "validating" and batch.metadata == {"purpose": "test"}
    done = ended(client, batch.id)
    assert done.status == "completed" and done.errors is None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (1000, 997, 3)
    answers = lines(client, done.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"request-{n}" for n in range(1000) if n not in bad]
    assert all(answer["response"]["status_code"] == 200 and answer["error"] is None for answer in answers)
    errors = {line["custom_id"]: line["response"]["status_code"] for line in lines(client, done.error_file_id)}
    assert errors == {"request-3": 400, "request-500": 400, "request-999": 400}
    # They are those that a client gets.
    by_id = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
    for number in (0, 110):
        direct = client.completions.create(**requests[number]["body"])
        assert by_id[f"request-{number}"] == direct.choices[0].text
    assert [found.id for found in client.batches.list(limit=1).data] == [batch.id]


def test_a_cancelled_batch_has_an_output_of_what_was_answered(served: Served) -> None:
    client = served.client()
    batch = create(client, upload(client, [request(n, max_tokens=200, ignore_eos=True) for n in range(600)]))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed, "an answer")
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = ended(client, batch.id)
    assert done.status == "cancelled" and 0 < done.request_counts.completed < 600
    answered = lines(client, done.output_file_id)
    rest = lines(client, done.error_file_id)
    assert len(answered) == done.request_counts.completed and len(answered) + len(rest) == 600
    assert {line["error"]["code"] for line in rest} == {"batch_cancelled"}


@pytest.mark.parametrize(
    ("requests", "code", "line"),
    [
        ([request(0), request(0)], "duplicate_custom_id", 2),
        ([request(0), {**request(1), "url": "/v1/embeddings"}], "invalid_url", 2),
        ([{**request(0), "method": "GET"}], "invalid_method", 1),
        ([request(0), request(1, model="no-such-model")], "model_not_found", 2),
    ],
)
def test_a_file_that_cannot_be_used_fails_the_batch_with_the_line(
    served: Served, requests: list[dict[str, Any]], code: str, line: int
) -> None:
    client = served.client()
    done = ended(client, create(client, upload(client, requests)).id)
    assert done.status == "failed" and done.request_counts.total == 0
    assert (done.errors.data[0].code, done.errors.data[0].line) == (code, line)


def test_a_route_that_the_model_lacks_fails_the_batch_with_the_line(served: Served) -> None:
    client = served.client()
    body = {"model": "tiny", "input": "the cat"}
    file = upload(client, [{"custom_id": "0", "method": "POST", "url": "/v1/embeddings", "body": body}])
    done = ended(client, create(client, file, endpoint="/v1/embeddings").id)
    assert done.status == "failed" and done.request_counts.total == 0
    (error,) = done.errors.data
    assert (error.code, error.line, error.param) == ("unsupported_route", 1, "body.model")


def test_wrong_batches_are_refused(served: Served) -> None:
    client = served.client()
    file = upload(client, [request(0)])
    other = client.files.create(file=("x.jsonl", b"{}\n"), purpose="user_data").id
    for wrong, message in (
        ({"file": "file-none"}, "input_file_id"),
        ({"file": other}, "purpose user_data; it must be batch"),
        ({"file": file, "completion_window": "1h"}, "completion_window"),
        ({"file": file, "endpoint": "/v1/moderations"}, "endpoint"),
    ):
        with pytest.raises(BadRequestError, match=message):
            create(client, **wrong)
    with pytest.raises(NotFoundError):
        client.batches.retrieve("batch_none")


def test_a_batch_run_on_the_app_answers_each_row_as_the_app_does_and_once(served: Served, tmp_path: Path) -> None:
    client = served.client()
    rows: list[dict[str, Any]] = [{"prompt": f"the cat {number}"} for number in range(200)]
    rows[3] = {"custom_id": "chat", "messages": [{"role": "user", "content": "hello"}]}
    rows[5]["model"], rows[7]["model"] = "red", "no-such-model"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["batch", "run", "--on-app", "--api-url", served.url, "--api-key", "test", "--input"]
    command += [str(tmp_path / "rows.jsonl"), "--model", "tiny", "--output", str(tmp_path / "out")]
    command += ["-s", "request.max_tokens=4", "-s", "request.temperature=0"]
    before = len(client.batches.list(limit=100).data)
    for _ in range(2):  # the second time nothing is sent
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == 3 and "199 of 200 rows answered" in ended.output, ended.output
        assert len(client.batches.list(limit=100).data) == before + 4
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["row"] for line in results] == [number for number in range(200) if number != 7]
    assert results[3]["custom_id"] == "chat" and results[3]["text"]
    for number in (0, 5, 199):
        model = rows[number].get("model", "tiny")
        prompt = rows[number]["prompt"]
        direct = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
        assert results[number - (number > 7)]["text"] == direct.choices[0].text
    (error,) = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert (error["row"], error["error"]["code"]) == (7, 404) and "no-such-model" in error["error"]["message"]
