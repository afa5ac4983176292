"""Starts engines one after another in one process and asks each: `python engine_world.py CASES RESULTS` (JSON files)."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx

from tandem import settings
from tandem.cluster.reaper import Reaper
from tandem.engine.create import create_engine
from tandem.engine.spec import EngineSpec
from tandem.serve.replica.host import EngineHost


async def ask(case: dict[str, Any]) -> dict[str, Any]:
    """Start the engine of one case, send its requests in their order, and stop it."""
    settings.export(case.get("env", {}))
    spec = EngineSpec(kind="vllm", id="tiny@1", name="tiny", max_adapters=0, **case["spec"])
    try:
        host = EngineHost(create_engine(spec), max_adapters=0)
        await host.start()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    try:
        async with httpx.AsyncClient(base_url=host.url, headers={"x-tandem-token": host.token}, timeout=120) as client:
            before = compiled()
            sampled = [
                (await client.post("/v1/completions", json={"model": "tiny", **request})).status_code
                for request in case["sampled"]
            ]
            made = sorted(compiled() - before)
            answers = [
                (await client.post("/v1/completions", json={"model": "tiny", "temperature": 0, **request})).json()
                for request in case["requests"]
            ]
            metrics = (await client.get("/metrics")).text
    finally:
        await host.drain(0.0)
    return {"answers": answers, "metrics": metrics, "sampled": sampled, "compiled": sorted(before), "made": made}


def compiled() -> set[str]:
    """Files of compiled code."""
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    """Every case, its result written as soon as it is there."""
    reaper = Reaper.of_children()
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {}
    for name, case in cases.items():
        results[name] = asyncio.run(ask(case))
        out.write_text(json.dumps(results))
    reaper.close()


if __name__ == "__main__":
    main()
