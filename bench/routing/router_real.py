"""Benefit of affinity routing on real engines: two vLLM replicas behind the real gateway, `affinity` against `round_robin`.

    python -m bench.routing.router_real [--rounds 4] [--requests 192] [--json FILE] [--check]

One Ray cluster, two replicas on the CPU, one thread each, and a gateway for each policy before the same two; only one of them has
work at a time. A tiny Llama and 8 LoRA adapters, `SLOTS` of which a replica holds. Each adapter has `PROMPTS` long beginnings of
prompts; a request is for an adapter, begins with one of its beginnings, and ends with a question of its own. All 32 beginnings,
about 70,000 tokens, are more than the KV cache of one replica has room for (`CACHE_TOKENS`), and less than that of two: who is
sent where decides how much is read twice. Engines with room for everything would answer alike under both policies.

`STREAMS` clients send one request after the other. Rounds alternate between the policies and take the same requests in the same
order; the first quarter of a round, which changes what the caches hold, is not counted. Prefix hits are what vLLM says of each
request (`cached_tokens`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.harness import report
from bench.harness.machine import machine
from bench.harness.models import write_model
from bench.harness.options import options_parser
from bench.harness.report import Verdict
from bench.harness.servers import KEYS, stack

BAR = 1.2
"""Requests/s of `affinity`, as a share of `round_robin`'s."""
POLICIES = ("affinity", "round_robin")
ADAPTERS, SLOTS, PROMPTS = 8, 4, 4
STREAMS, TOKENS = 16, 16
PROMPT_BYTES = 7_000
BLOCK, BLOCKS = 128, 360
"""Tokens of a block of the CPU's KV cache, and blocks of each replica."""
CACHE_TOKENS = BLOCK * BLOCKS
COLUMNS = ("policy", "requests/s", "of in turn", "prefix hits", "ms p50", "ms p99", "failed")


def main() -> int:
    """Measure; 1 if the bar is missed and --check is given."""
    parser = options_parser(__doc__, smoke="one round of few requests")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=192, help="of each policy in a round")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.requests = 1, 16
    rounds = report.Rounds(options.json)
    machine_info = machine()
    with contextlib.ExitStack() as exit_stack:
        folder = Path(exit_stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp")))
        write_all(folder)
        texts = prompt_prefixes()
        port = exit_stack.enter_context(stack("routed", folder))
        for number in range(options.rounds):
            for policy in POLICIES if number % 2 else reversed(POLICIES):
                url = f"http://127.0.0.1:{port}/{policy}/v1/completions"
                figures = asyncio.run(drive(url, KEYS[port], texts, options.requests, seed=number))
                rounds.append({"policy": policy, "round": number, **figures})
                print(f"round {number} {policy:12} {figures['requests_per_s']:6.1f} requests/s", flush=True)
    summary = summarise(rounds)
    rows, results = [cells(row) for row in summary], verdicts(summary)
    title = (
        f"Two vLLM replicas of {SLOTS} slots, {ADAPTERS} adapters, {ADAPTERS * PROMPTS} beginnings, {STREAMS} streams"
    )
    report.show(f"{title}, medians", COLUMNS, rows)
    page = f"# The router before real engines\n\nMade by `python -m bench.routing.router_real --json ...`. {title}.\n\n"
    page += f"{report.markdown_table(COLUMNS, rows)}\n\n{report.verdict_lines(results)}\n"
    report.write(options.json, {"machine": machine_info, "summary": summary, "rounds": rounds}, page)
    return report.judge(results, check=options.check)


# ---- the served app --------------------------------------------------------------------------------------------------


def write_all(folder: Path) -> None:
    """The model with room for long prompts, its adapters, and how they are served."""
    write_model(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    code = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
for number in range(int(sys.argv[3])):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(f"{sys.argv[2]}/adapter-{number}")
"""
    command = [sys.executable, "-c", code, str(folder / "model"), str(folder / "adapters"), str(ADAPTERS)]
    subprocess.run(command, check=True, capture_output=True)
    args = {
        "max_model_len": 4096,
        "block_size": BLOCK,
        "num_gpu_blocks_override": BLOCKS,
        "enable_prompt_tokens_details": True,
    }
    keys = {"max_adapters": SLOTS, "max_cached_adapters": SLOTS, "max_lora_rank": 8, "engine_args": args}
    (folder / "routed.json").write_text(json.dumps(keys))


def prompt_prefixes() -> list[list[str]]:
    """Prompt prefixes from Python's own sources, `PROMPTS` for each adapter, all different."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(file.read_text(errors="replace") for file in files[:80])
    pieces = [text[at : at + PROMPT_BYTES] for at in range(0, ADAPTERS * PROMPTS * PROMPT_BYTES, PROMPT_BYTES)]
    return [pieces[i * PROMPTS : (i + 1) * PROMPTS] for i in range(ADAPTERS)]


# ---- the load -------------------------------------------------------------------------------------------------------


async def drive(url: str, key: str, texts: list[list[str]], requests: int, *, seed: int) -> dict[str, Any]:
    """One round of one policy."""
    dice = random.Random(seed)
    plan = []
    for number in range(requests):
        adapter = dice.randrange(ADAPTERS)
        question = f"\n# {seed}, {number}: what does this do?"
        plan.append({"model": f"adapter-{adapter}", "prompt": dice.choice(texts[adapter]) + question})
    requests_left = iter(enumerate(plan))
    answers: list[dict[str, Any]] = []
    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=120)) as session:
        await asyncio.gather(*(_stream(session, url, requests_left, answers) for _ in range(STREAMS)))
    answers.sort(key=lambda answer: answer["ended"])
    # The beginning of a round finds the caches as the other policy left them.
    skipped = requests // 4
    measured = answers[skipped:]
    succeeded = [answer for answer in measured if answer["prompt_tokens"]]
    latencies = sorted(answer["ended"] - answer["began"] for answer in succeeded) or [0.0]
    return {
        "requests_per_s": len(succeeded) / (measured[-1]["ended"] - answers[skipped - 1]["ended"]),
        "prefix_hits": sum(a["cached_tokens"] for a in succeeded) / max(1, sum(a["prompt_tokens"] for a in succeeded)),
        "prompt_tokens": statistics.fmean(answer["prompt_tokens"] for answer in succeeded) if succeeded else 0.0,
        "ms_p50": 1000 * latencies[len(latencies) // 2],
        "ms_p99": 1000 * latencies[int(0.99 * (len(latencies) - 1))],
        "failed": [answer["said"] for answer in answers if answer["said"]][:3],
    }


async def _stream(session: aiohttp.ClientSession, url: str, requests_left: Any, answers: list[dict[str, Any]]) -> None:
    for _, request in requests_left:
        start_time = time.perf_counter()
        body = {**request, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        error, usage = "", {}
        try:
            async with session.post(url, json=body) as response:
                if response.status == 200:
                    usage = (await response.json())["usage"]
                else:
                    error = f"{response.status} {(await response.text())[:300]}"
        except (aiohttp.ClientError, TimeoutError) as exception:
            error = repr(exception)
        answers.append(
            {
                "began": start_time,
                "ended": time.perf_counter(),
                "prompt_tokens": usage.get("prompt_tokens", 0),
                "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
                "said": error,
            }
        )


# ---- results ---------------------------------------------------------------------------------------------------------


def summarise(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds; a ratio is the median of each round's own."""
    rows = []
    turn = {r["round"]: r["requests_per_s"] for r in rounds if r["policy"] == "round_robin"}
    for policy in POLICIES:
        policy_rounds = [r for r in rounds if r["policy"] == policy]
        ratios = [r["requests_per_s"] / turn[r["round"]] for r in policy_rounds]
        row: dict[str, Any] = {
            "policy": policy,
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
        for key in ("requests_per_s", "prefix_hits", "ms_p50", "ms_p99"):
            row[key] = statistics.median(r[key] for r in policy_rounds)
        row["failed"] = sum(len(r["failed"]) for r in policy_rounds)
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        row["policy"], f"{row['requests_per_s']:.1f}", f"{row['ratio']:.2f} ({row['range'][0]:.2f}-{row['range'][1]:.2f})",
        f"{row['prefix_hits']:.1%}", f"{row['ms_p50']:,.0f}", f"{row['ms_p99']:,.0f}", str(row["failed"]),
    ]  # fmt: skip


def verdicts(summary: list[dict[str, Any]]) -> list[Verdict]:
    """The bar."""
    failures = [
        Verdict(False, 0.0, f"{row['policy']}: {row['failed']} failed requests") for row in summary if row["failed"]
    ]
    ratio = summary[0]["ratio"]
    return [
        *failures,
        Verdict(ratio >= BAR, ratio / BAR, f"affinity: {ratio:.2f} of round robin's throughput (bar {BAR})"),
    ]


if __name__ == "__main__":
    sys.exit(main())
