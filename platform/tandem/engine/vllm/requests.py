"""Rules of vLLM for requests: those that it cannot serve, its scheduling by priority, its errors in plain words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.config import ServedModelConfig
from tandem.engine.descriptor import UnsupportedRequestError
from tandem.engine.vllm.parsers import explain_refusal, tools_unsupported_message
from tandem.engine.vllm.wording import ENGINE_STOPPED, simplify_message

UNREADABLE_CHUNK = "validation error for ChatCompletionStreamResponse"
"""vLLM converts its stream of OpenAI chunks to Anthropic's; an error in it is a chunk that it cannot parse."""


def check_request(model: str, body: Mapping[str, Any], config: ServedModelConfig, supports_tools: bool) -> None:
    """UnsupportedRequestError for tools at a model without them, and for prompt logprobs on CPUs with adapters."""
    if not supports_tools and asks_for_tools(body):
        # Some of vLLM's routes would ignore the tools silently.
        raise UnsupportedRequestError(tools_unsupported_message(model), "tools")
    if config.max_adapters and not config.gpus_per_replica and asks_for_prompt_logprobs(body):
        raise UnsupportedRequestError(
            f"The model {model!r} runs on CPUs with adapters, where vLLM has no logprobs of a prompt (`prompt_logprobs`, or "
            "`echo` with `logprobs`). Use it with max_adapters: 0, or on a GPU.",
            "prompt_logprobs" if "prompt_logprobs" in body else "echo",
        )


def asks_for_tools(body: Mapping[str, Any]) -> bool:
    """Whether a request has tools that the model may call."""
    choice = body.get("tool_choice")
    disabled = choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none")
    return bool(body.get("tools")) and not disabled


def asks_for_prompt_logprobs(body: Mapping[str, Any]) -> bool:
    """Whether a request wants the logprobs of its prompt.

    On a CPU, with adapters on, such a request ends the engine: vLLM 0.32 multiplies the adapters of the tokens to be sampled
    with the rows of the whole prompt; where more than one request runs, these have different sizes (docs/adr/0013).
    """
    # 0 asks for the logprob of each token itself, so it is not the same as false.
    logprobs = any(body.get(key) is not None and body.get(key) is not False for key in ("logprobs", "top_logprobs"))
    return body.get("prompt_logprobs") is not None or bool(body.get("echo") and logprobs)


def keeps_priority(engine_args: Mapping[str, Any]) -> bool:
    """Whether vLLM schedules by `priority`; without that policy it refuses requests that have one."""
    return bool(engine_args.get("scheduling_policy") == "priority")


def explain_error(message: str, model: str | None) -> str:
    """An error of vLLM without pydantic's terms, references to its log and advice to its operator."""
    if UNREADABLE_CHUNK in message:
        return f"{ENGINE_STOPPED}."
    return simplify_message(explain_refusal(message, model))
