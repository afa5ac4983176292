"""Callers of batches' requests have the rights of the key or token that made the batch, and unknown names cost little."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from tandem.api.openai.batches import BatchCreation
from tandem.auth.key_table import KeyTable
from tandem.auth.keys import KeyStore
from tandem.config.serving.batches import BatchesConfig
from tandem.files.content import ContentStore
from tandem.files.outputs import write_output
from tandem.files.records import Purpose
from tandem.files.store import FileStore
from tandem.gateway.admission.control import Admission
from tandem.gateway.errors import unknown_model
from tandem.gateway.models.catalog import Catalog
from tandem.gateway.work import callers as module
from tandem.gateway.work.callers import Callers, PoolLoads
from tandem.jobs.batches.requests import BatchRequest
from tandem.jobs.batches.service import BatchService
from tandem.jobs.batches.stored import items_of
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.store import JobStore


def test_a_batch_made_with_a_token_may_use_the_models_of_the_token_alone(tandem_home: Path) -> None:
    store, files = JobStore.open(), FileStore.open()
    contents = ContentStore.open(store.identity, None)
    file = write_output(files, contents, [b"{}"], tenant="t", purpose=Purpose.BATCH, filename="in", quota_bytes=100)
    service = BatchService(store, ItemQueue.open(), files, BatchesConfig())
    creation = BatchCreation(completion_window="24h", endpoint="/v1/completions", input_file_id=file.id)
    batch = service.create(creation, tenant="t", key_id="oidc:somebody", models=("small",))
    request = BatchRequest(line=1, custom_id="a", model="large", offset=0, length=2)
    (item,) = items_of(store.get(batch.id), [request], 3)
    callers = Callers(KeyTable(KeyStore.open()))
    principal = callers(item.key_id, item.tenant, tuple((item.payload or {}).get("models", ())))
    assert principal is not None and principal.tenant == "t"
    assert principal.may_use("small") and not principal.may_use("large")
    unlimited = callers("oidc:somebody", "t")
    assert unlimited is not None and unlimited.may_use("large")


class NoModels:
    """A catalog without models, which counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def resolve(self, name: str, principal: Any) -> Any:
        self.asked.append(name)
        raise unknown_model(name)


async def test_a_name_that_no_model_has_is_not_looked_up_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = NoModels()
    loads = PoolLoads(cast(Catalog, catalog), cast(Admission, None))
    for _ in range(3):
        await loads.learn(["a", "b"])
    assert catalog.asked == ["a", "b"] and loads("a") is None
    monkeypatch.setattr(module, "UNKNOWN_S", 0.0)
    await loads.learn(["c"])
    await loads.learn(["a"])
    assert catalog.asked == ["a", "b", "c", "a"]
