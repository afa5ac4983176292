"""The app that bench/serving/chaos_serve.py does harm to: its cluster of two nodes, and the processes of its parts."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench.harness.nodes import Node

REPLICAS, GATEWAYS = 2, 2
NODE_CPUS, REPLICA_CPUS = 2, 1.2
"""A node has room for one replica, so each of the two has one."""
STUCK_AFTER_S = 8.0
MODEL = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
tokenizer.train_from_iterator(["one two three four five six"] * 9, trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(sys.argv[1])
torch.manual_seed(0)
# Large weights keep the best token ahead of the second, whatever the batch.
LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0,
    eos_token_id=1)).save_pretrained(sys.argv[1])
"""


def title(process: psutil.Process) -> str:
    """The title of a process."""
    try:
        words = process.cmdline()
        return os.path.basename(words[0]) if words and "haproxy" in words[0] else " ".join(words)
    except psutil.Error:
        return ""


def records() -> list[Any]:
    """The replicas as the app's directory knows them."""
    from ray import serve

    directory = serve.get_deployment_handle("Directory", "tandem")
    return list(directory.watch.remote(0).result(timeout_s=10).replicas)


def listener(record: Any) -> psutil.Process | None:
    """The process of a replica that is ready."""
    if record.state != "ready":
        return None
    url = urlsplit(record.url)
    address = (url.hostname, url.port)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(c.status == psutil.CONN_LISTEN and c.laddr == address for c in process.net_connections("tcp")):
                return process
    return None


@contextlib.contextmanager
def serving(engine: str) -> Iterator[tuple[Any, Node, str]]:
    """The app on its own cluster of two nodes: the cluster, the second node, and the app's address."""
    from tandem import settings

    with tempfile.TemporaryDirectory(prefix="tc-", dir="/tmp") as temporary:
        settings.export({"TANDEM_HOME": temporary, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, override=True)
        from tandem.cluster.local import local_cluster
        from tandem.cluster.ports import free_ports

        model: dict[str, Any] = {
            "model": "echo", "name": "tiny", "engine": "echo", "engine_args": {"delay_s": 0.05, "max_length": 512},
        }  # fmt: skip
        if engine == "vllm":
            subprocess.run([sys.executable, "-c", MODEL, f"{temporary}/tiny"], check=True, capture_output=True)
            model = {"model": f"{temporary}/tiny", "max_adapters": 0, "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
        with local_cluster(num_cpus=NODE_CPUS) as cluster:
            import ray
            from ray import serve

            from tandem.apps.build import build_app
            from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig

            node = Node(cluster, NODE_CPUS)
            node.start()
            ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
            while len([n for n in ray.nodes() if n["Alive"]]) < 2:
                time.sleep(0.2)
            port = free_ports(1)[0]
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            served_model = ServedModelConfig(
                replicas=REPLICAS, cpus_per_replica=REPLICA_CPUS, stuck_after_s=STUCK_AFTER_S, **model
            )
            config = ServeConfig(models=(served_model,), gateway=GatewayConfig(replicas=GATEWAYS))
            serve.run(build_app(config, check=False), name="tandem", route_prefix="/")
            while sum(record.state == "ready" for record in records()) < REPLICAS:
                time.sleep(0.2)
            try:
                yield cluster, node, f"http://127.0.0.1:{port}"
            finally:
                ray.shutdown()
