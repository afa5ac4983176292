"""One Ray cluster and one Serve app with a real vLLM engine, shared by every serving test of a session."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tandem.cluster.ports import free_ports

MAX_LENGTH = 2048
ADMIN_TOKEN = "operator"
PROMPTS = ("the cat sat on the mat", "one two three four", "a dog and a cat ran over the hill")
TEMPLATE = (
    "{% if tools %}tools: {% for t in tools %}{{ t['function']['name'] }} {% endfor %}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] or '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(kw_only=True)
class Served:
    """A running app, and what it was made from."""

    url: str
    """`http://host:port`, without /v1."""
    home: Path
    base: Path
    adapters: dict[str, Path] = field(default_factory=dict)
    """Folders of adapters by name; `red` and `blue` are registered, the rest are not."""
    app: str = "tandem"

    def client(self, **options: Any) -> Any:
        """The openai SDK, which retries nothing unless it is told to."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="test", **{"max_retries": 0, "timeout": 60.0, **options})

    def anthropic(self, **options: Any) -> Any:
        """Anthropic's SDK, in the same way."""
        from anthropic import Anthropic

        return Anthropic(base_url=self.url, api_key="test", **{"max_retries": 0, "timeout": 60.0, **options})

    def replicas(self) -> tuple[Any, ...]:
        """What the app's directory knows."""
        from ray import serve

        directory = serve.get_deployment_handle("Directory", self.app)
        return tuple(directory.watch.remote(0).result(timeout_s=30).replicas)

    def metric(self, name: str) -> float:
        """A counter or gauge of the one engine, from vLLM's own metrics."""
        import httpx

        (replica,) = self.replicas()
        text = httpx.get(f"{replica.url}/metrics", headers={"x-tandem-token": replica.token}, timeout=30).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))

    def access_log(self) -> list[str]:
        """The lines of the gateway's access log."""
        return [
            line for path in sorted((self.home / "logs").glob("access-*")) for line in path.read_text().splitlines()
        ]

    def registry(self) -> Any:
        """The registry that the app looks at."""
        from tandem.registry import Registry

        return Registry(f"sqlite:///{self.home}/tandem.db")


def write_model(
    folder: Path, *, max_length: int = MAX_LENGTH, layers: int = 2, hidden: int = 128, judge: bool = False
) -> Path:
    """A random Llama with a BPE tokenizer, as Hugging Face folders are; a `judge` gives a text one score."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=max_length,
        # Large weights keep the best token well ahead of the second, whatever the order of sums.
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        num_labels=1,
    )
    torch.manual_seed(0)
    (LlamaForSequenceClassification if judge else LlamaForCausalLM)(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PROMPTS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, *, seed: int, rank: int = 8) -> Path:
    """A LoRA adapter that changes the model's answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


def greedy_tokens(base: Path, adapter: Path | None, prompt: str, tokens: int) -> list[int]:
    """The tokens that Hugging Face (and peft) generate, greedily and in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=2)
    return [int(token) for token in out[0, ids.shape[1] :]]


def process_of(record: Any) -> psutil.Process:
    """The process of a replica: the one that listens on its port."""
    # Of another address the same port may be somebody else's.
    url = urlsplit(record.url)
    where = (url.hostname, url.port)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(c.status == psutil.CONN_LISTEN and c.laddr == where for c in process.net_connections("tcp")):
                return process
    raise AssertionError(f"nobody listens on {where}")


def free_port() -> int:
    """A port that is free now."""
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def serve_port(ray_cluster: Any) -> int:
    """The port of the session's one Ray Serve; apps of several tests are below prefixes of their own."""
    from ray import serve

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return port


@pytest.fixture(scope="session")
def served(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A base called `tiny` with adapters `red` and `blue`, served by one vLLM engine with two adapter slots."""
    from ray import serve

    from tandem.apps.build import build_app
    from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig

    folder = tmp_path_factory.mktemp("served")
    base = write_model(folder / "tiny")
    adapters = {name: write_adapter(folder / name, base, seed=i) for i, name in enumerate(("red", "blue", "green"))}
    result = Served(url=f"http://127.0.0.1:{serve_port}", home=folder / "home", base=base, adapters=adapters)
    result.home.mkdir()
    registry = result.registry()
    registry.register_model("tiny", base)
    for name in ("red", "blue"):
        registry.register_adapter(name, adapters[name], base="tiny")
    # No engine_args: tools and schemas must work without.
    tiny = ServedModelConfig(model="tiny", max_adapters=2, max_lora_rank=8, cpus_per_replica=1, hold_s=10.0)
    sources = GatewayConfig(adapter_sources=(str(tmp_path_factory.getbasetemp()),))
    config = ServeConfig(models=(tiny,), app=result.app, gateway=sources)
    with pytest.MonkeyPatch.context() as patch:
        # The app has a registry of its own, so that other tests' models are not in its lists.
        patch.setenv("TANDEM_HOME", str(result.home))
        patch.setenv("TANDEM_ADMIN_TOKEN", ADMIN_TOKEN)
        app = build_app(config, check=False)
    try:
        serve.run(app, name=result.app, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications[result.app].deployments.values()
        raise AssertionError("\n".join(each.message for each in found if each.message)) from error
    return result


@dataclass(kw_only=True)
class Pooled(Served):
    """An app of models that write nothing: `embedder` makes vectors, `judge` scores pairs of texts."""

    judge: Path


@pytest.fixture(scope="session")
def pooled(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Pooled:
    """A second app beside the first, below `/pooled`."""
    from ray import serve

    from tandem.apps.build import build_app
    from tandem.config import ServeConfig, ServedModelConfig

    folder = tmp_path_factory.mktemp("pooled")
    judge = write_model(folder / "judge", judge=True)
    models = (
        ServedModelConfig(
            model=str(served.base),
            name="embedder",
            max_adapters=0,
            engine_args={"runner": "pooling", "convert": "embed", "max_model_len": 256},
        ),
        ServedModelConfig(model=str(judge), name="judge", max_adapters=0, engine_args={"max_model_len": 256}),
    )
    app = build_app(ServeConfig(models=models, app="pooled"), check=False)
    serve.run(app, name="pooled", route_prefix="/pooled")
    return Pooled(url=f"{served.url}/pooled", home=served.home, base=served.base, judge=judge, app="pooled")
