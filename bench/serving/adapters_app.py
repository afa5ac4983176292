"""The app for bench/serving/adapters.py: two replicas of a small model, adapters for it, and a client that costs little."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench.harness.load import Stream, Tally
from bench.harness.servers import ENVIRONMENT, free_port

HIDDEN, INNER, LAYERS, HEADS = 1280, 3456, 6, 20
"""119 million parameters. Of a narrow model's step most is the fixed price of vLLM's many small LoRA operations on a CPU."""
RANK, CONTENTS = 8, 20
SLOTS, REPLICAS = 8, 2
PROMPT = "import os\n\ndef main(path):\n    return os.path.join(path"
MODEL = """
import sys, sysconfig
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<s>", "</s>"], show_progress=False)
tokenizer.train([str(f) for f in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(sys.argv[1])
torch.manual_seed(0)
hidden, inner, layers, heads = map(int, sys.argv[2:])
LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
    tie_word_embeddings=True)).save_pretrained(sys.argv[1])
"""


class Mixed(Stream):
    """One connection that sends requests of its own list, one after the other."""

    def __init__(self, requests: Sequence[bytes], tokens: int, tally: Tally) -> None:
        super().__init__(requests[0], tokens, len(requests), tally)
        self._requests = iter(requests)

    def _send(self) -> None:
        self._request = next(self._requests)
        super()._send()


class App:
    """The served app, as its clients and its operator see it."""

    def __init__(self, port: int, home: Path) -> None:
        from tandem.registry import Registry

        self.port, self.home = port, home
        self.registry = Registry(f"sqlite:///{home}/tandem.db")

    def request(self, model: str, tokens: int) -> bytes:
        """The bytes of one streamed completion."""
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }
        raw = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer bench\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        return head.encode() + raw

    async def drive(self, streams: Sequence[Sequence[str]], tokens: int) -> dict[str, Any]:
        """Ask for the models of each stream in turn; tokens/s are of the time in which all streams were under way."""
        loop, tallies = asyncio.get_running_loop(), [Tally() for _ in streams]
        start_time = time.perf_counter()
        connections = []
        for models, tally in zip(streams, tallies, strict=True):
            requests = [self.request(model, tokens) for model in models]

            def build_connection(requests: list[bytes] = requests, tally: Tally = tally) -> Mixed:
                return Mixed(requests, tokens, tally)

            connections.append((await loop.create_connection(build_connection, "127.0.0.1", self.port))[1])
        finished = [connection.done for connection in connections]
        # When the first stream has had all its answers, the others' last ones meet an engine that is half idle.
        await asyncio.wait(finished, return_when=asyncio.FIRST_COMPLETED)
        seconds, events = time.perf_counter() - start_time, sum(tally.events for tally in tallies)
        await asyncio.gather(*finished)
        # Each answer has some events more than tokens.
        share = sum(len(tally.between) for tally in tallies) * tokens / max(1, sum(tally.events for tally in tallies))
        return {
            "tokens_per_s": events * share / seconds,
            "first_token_ms": [1000 * first for tally in tallies for first in tally.first],
            "between_tokens_ms": 1000
            * statistics.median([gap_s for tally in tallies for gap_s in tally.between] or [0.0]),
            "failed": [reason for tally in tallies for reason in tally.failed],
        }

    async def first_token_ms(self, model: str) -> float:
        """Of one short request; RuntimeError if it fails."""
        figures = await self.drive([[model]], 4)
        if figures["failed"]:
            raise RuntimeError(figures["failed"][0])
        return float(figures["first_token_ms"][0])

    async def residency(self) -> list[Any]:
        """The adapters of each replica, from the app's directory."""
        from ray import serve

        directory = serve.get_deployment_handle("Directory", "tandem")
        return list((await directory.watch.remote(0)).replicas)


def write_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of all linear layers, as peft writes it."""
    folder.mkdir(parents=True)
    dice = np.random.default_rng(seed)
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    tensors = {}
    for layer in range(LAYERS):
        for name in (*attention, *mlp):
            block = "self_attn" if name in attention else "mlp"
            wide, out = INNER if name == "down_proj" else HIDDEN, INNER if name in ("gate_proj", "up_proj") else HIDDEN
            key = f"base_model.model.model.layers.{layer}.{block}.{name}.lora_"
            tensors[f"{key}A.weight"] = dice.normal(0, 0.02, (RANK, wide)).astype(np.float32)
            tensors[f"{key}B.weight"] = dice.normal(0, 0.02, (out, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": [*attention, *mlp], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def register_many(app: App, folder: Path, count: int) -> float:
    """`count` adapters with an id and a folder each, which share a few contents by hard links; the seconds it took."""
    contents = [write_adapter(folder / f"content-{number}", number) for number in range(CONTENTS)]
    start_time = time.perf_counter()
    for number in range(count):
        adapter_folder = folder / f"adapter-{number:04}"
        adapter_folder.mkdir()
        for file in contents[number % CONTENTS].iterdir():
            os.link(file, adapter_folder / file.name)
        app.registry.register_adapter(adapter_folder.name, adapter_folder, base="bench")
    return time.perf_counter() - start_time


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[App, Any]]:
    """The app on a cluster of its own, and the cluster."""
    from tandem.cluster.local import local_cluster
    from tandem.registry import Registry

    home = folder / "home"
    os.environ.update(ENVIRONMENT, TANDEM_HOME=str(home))
    sizes = [str(size) for size in (HIDDEN, INNER, LAYERS, HEADS)]
    subprocess.run([sys.executable, "-c", MODEL, str(folder / "model"), *sizes], check=True, capture_output=True)
    Registry(f"sqlite:///{home}/tandem.db").register_model("bench", folder / "model")
    with local_cluster(num_cpus=10) as cluster:
        import ray
        from ray import serve

        from tandem.apps.build import build_app
        from tandem.config import ServeConfig, ServedModelConfig

        port = free_port()
        model = ServedModelConfig(
            model="bench",
            replicas=REPLICAS,
            max_adapters=SLOTS,
            max_lora_rank=RANK,
            engine_args={"max_model_len": 1024},
        )
        ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(ServeConfig(models=(model,)), check=False), name="tandem", route_prefix="/")
        try:
            yield App(port, home), cluster
        finally:
            ray.shutdown()
