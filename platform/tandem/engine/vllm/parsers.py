"""Selection of vLLM's tool and reasoning parsers from a model's family and chat template (docs/adr/0023).

Pure but for `read_parsers`, which reads the model's folder. `engine_args.tool_call_parser` and `engine_args.reasoning_parser`
override what is selected here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tandem.engine.vllm.wording import MAX_MESSAGE_CHARS

FALLBACK_TOOL_PARSER = "pythonic"
"""For templates with tools in an unknown format: it needs no special tokens, leaves other text alone, and vLLM constrains a call
that must be made (`required`, or a named function) to JSON of the tool's schema."""
REFUSES_TOOLS = re.compile(r"--(?:tool-call-parser|enable-auto-tool-choice)")
"""vLLM's message for a request with tools at a model without a tool parser."""


class Rule(NamedTuple):
    """A parser, and the models that it fits."""

    parser: str
    families: tuple[str, ...] = ()
    """Prefixes of `model_type`; empty: any family."""
    template_marks: tuple[str, ...] = ()
    """Text that the chat template must contain, all of it."""
    tokens: tuple[str, ...] = ()
    """Tokens that the parser looks up in the tokenizer; without them it refuses every request."""


DEEPSEEK_CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
TOOL_RULES = (
    # Families with one format of their own, whatever their templates look like.
    Rule("openai", ("gpt_oss",)),
    Rule("deepseek_v32", ("deepseek_v32",)),
    Rule("deepseek_v4", ("deepseek_v4",)),
    Rule("deepseek_v3", ("deepseek",), (DEEPSEEK_CALLS, "```json"), (DEEPSEEK_CALLS,)),
    Rule("deepseek_v31", ("deepseek",), (DEEPSEEK_CALLS,), (DEEPSEEK_CALLS,)),
    Rule("kimi_k3", ("kimi_k3",)),
    Rule("kimi_k2", ("kimi_k2", "deepseek"), ("<|tool_calls_section_begin|>",), ("<|tool_calls_section_begin|>",)),
    Rule("gemma4", ("gemma4",)),
    Rule("functiongemma", ("gemma",), ("<start_function_call>",)),
    Rule("minimax_m3", ("minimax_m3",)),
    Rule("minimax_m2", (), ("<minimax:tool_call>",)),
    Rule("seed_oss", ("seed_oss",), ("<seed:tool_call>",), ("<seed:tool_call>",)),
    Rule("longcat", ("longcat",), ("<longcat_tool_call>",)),
    Rule("lfm2", ("lfm2",), (), ("<|tool_call_start|>", "<|tool_call_end|>")),
    Rule("olmo3", ("olmo3",), ("<function_calls>",)),
    Rule("apertus", ("apertus",)),
    Rule("ernie45", ("ernie4_5",)),
    Rule("step3p5", ("step3p5",)),
    Rule("step3", ("step3",)),
    Rule("hunyuan_a13b", ("hunyuan_v1",)),
    Rule("cohere_command3", ("cohere2",), ("<|START_ACTION|>",)),
    Rule("jamba", ("jamba",), ("<tool_calls>",), ("<tool_calls>", "</tool_calls>")),
    Rule("internlm", ("internlm2",), ("<|action_start|>",)),
    Rule("phi4_mini_json", ("phi3", "phi4"), ("<|tool|>",)),
    Rule("granite", ("granite",), ("<|tool_call|>",)),
    Rule("granite4", ("granite",), ("<tool_call>",)),
    Rule("llama4_pythonic", ("llama4",)),
    # Formats that fine-tunes of many families have.
    Rule("glm47", (), ("<tool_call>", "<arg_key>")),
    Rule("qwen3_coder", (), ("<tool_call>", "<function="), ("<tool_call>", "</tool_call>")),
    Rule("hermes", (), ("<tool_call>",)),
    Rule("mistral", (), ("[TOOL_CALLS]",), ("[TOOL_CALLS]",)),
    Rule("llama3_json", (), ("<|python_tag|>",), ("<|python_tag|>",)),
    # The templates of Llama 3.2 name no such token, though their tokenizers have it.
    Rule("llama3_json", ("llama",), ('{"name": function name, "parameters":',), ("<|python_tag|>",)),
)
"""The first that fits is taken. A family's rule stands before those of any family."""

THINK_TOKENS = ("<think>", "</think>")
REASONING_RULES = (
    Rule("openai_gptoss", ("gpt_oss",)),
    Rule("gemma4", ("gemma4",), ("enable_thinking",)),
    Rule("deepseek_v4", ("deepseek_v4",), ("thinking",)),
    Rule("deepseek_v3", ("deepseek",), ("thinking", "</think>"), THINK_TOKENS),
    Rule("kimi_k3", ("kimi_k3",)),
    Rule("kimi_k2", ("kimi_k2",), ("<think>",), THINK_TOKENS),
    Rule("minimax_m3", ("minimax_m3",)),
    Rule("minimax_m2", ("minimax_m2",), ("<think>",), THINK_TOKENS),
    Rule("glm45", ("glm4", "glm_moe"), ("<think>",), THINK_TOKENS),
    Rule("seed_oss", ("seed_oss",), ("<seed:think>",), ("<seed:think>", "</seed:think>")),
    Rule("ernie45", ("ernie4_5",), ("<think>",), THINK_TOKENS),
    Rule("olmo3", ("olmo3",), ("<think>",)),
    Rule("step3p5", ("step3p5",), ("<think>",), THINK_TOKENS),
    Rule("step3", ("step3",), ("<think>",), THINK_TOKENS),
    Rule("hunyuan_a13b", ("hunyuan_v1",), ("<think>",)),
    Rule("cohere_command3", ("cohere2",), ("<|START_THINKING|>",), ("<|START_THINKING|>", "<|END_THINKING|>")),
    Rule("granite", ("granite",), ("Here is my thought process",)),
    Rule("nemotron_v3", ("nemotron_h",), ("<think>",), THINK_TOKENS),
    Rule("mistral", ("mistral", "ministral"), ("[THINK]",), ("[THINK]", "[/THINK]")),
    Rule("mimo", ("mimo",), ("<think>",), THINK_TOKENS),
    Rule("qwen3", ("qwen3",), ("<think>",), THINK_TOKENS),
)
THINKING_PROMPT_RULE = Rule("deepseek_r1", (), ("<think>",), THINK_TOKENS)
"""For any family whose generation prompt opens a thought unconditionally, as those of DeepSeek-R1, its distillates and QwQ do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsers:
    """The parsers of a model, each with the reason for it."""

    tool: str | None = None
    """vLLM's name of the tool parser; None: the model takes no tools."""
    tool_reason: str
    reasoning: str | None = None
    """vLLM's name of the reasoning parser; None: thoughts, if there are any, are part of the answer."""
    reasoning_reason: str
    chat: bool = False
    """Whether there is a chat template."""

    def described(self) -> dict[str, str]:
        """Name of each parser and the reason for it, for terminal output."""
        return {
            "tool parser": f"{self.tool or 'none'} ({self.tool_reason})",
            "reasoning parser": f"{self.reasoning or 'none'} ({self.reasoning_reason})",
        }


def select_parsers(model_type: str, template: str | None, tokenizer: str) -> Parsers:
    """The parsers for a family (`model_type` of config.json) and a chat template (None: there is none).

    `tokenizer`: text that contains the tokenizer's tokens, as tokenizer.json does.
    """
    if template is None:
        reason = "the model has no chat template"
        return Parsers(tool_reason=reason, reasoning_reason=reason)
    tool, tool_reason = _tool_parser(model_type, template, tokenizer)
    reasoning, reasoning_reason = _reasoning_parser(model_type, template, tokenizer)
    return Parsers(
        tool=tool, tool_reason=tool_reason, reasoning=reasoning, reasoning_reason=reasoning_reason, chat=True
    )


def served_parsers(folder: Path, engine_args: Mapping[str, Any]) -> Parsers:
    """The parsers for a model that is served with these arguments: `chat_template` and `tokenizer` override the folder's own."""
    template, tokenizer = engine_args.get("chat_template"), engine_args.get("tokenizer")
    tokens = Path(tokenizer).expanduser() if isinstance(tokenizer, str) else folder
    # A tokenizer of the hub is not here to be read.
    return read_parsers(folder, template if isinstance(template, str) else None, tokens if tokens.is_dir() else None)


def tool_arguments(parsers: Parsers, engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM for tools, beside those that are given: vLLM refuses the switch alone and ignores a parser alone."""
    if "tool_call_parser" in engine_args:
        return (
            {}
            if "enable_auto_tool_choice" in engine_args
            else {"enable_auto_tool_choice": bool(engine_args["tool_call_parser"])}
        )
    if parsers.tool is None or engine_args.get("enable_auto_tool_choice") is False:
        return {}
    return {"tool_call_parser": parsers.tool, "enable_auto_tool_choice": True}


def read_parsers(folder: Path, template: str | None = None, tokenizer: Path | None = None) -> Parsers:
    """The parsers for a model's folder in Hugging Face's format; `template` stands in for the folder's own.

    `template` is a file's path or the text itself; `tokenizer` is another folder whose template and tokens are read. Files that
    are missing or cannot be read count as empty.
    """
    tokenizer_folder = folder if tokenizer is None else tokenizer
    if template is not None and "\n" not in template and "{" not in template:
        template = _text(Path(template).expanduser())
    tokenizer_text = "".join(
        _text(tokenizer_folder / name) for name in ("tokenizer.json", "tokenizer_config.json", "tekken.json")
    )
    model_type = str(_json(folder / "config.json").get("model_type") or "")
    return select_parsers(model_type, read_template(tokenizer_folder) if template is None else template, tokenizer_text)


def read_template(folder: Path) -> str | None:
    """The chat template of a model's folder; of several, the one for tools. None: there is none."""
    if text := _text(folder / "chat_template.jinja"):
        return text
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _json(folder / name).get("chat_template")
        if isinstance(template, list):
            templates_by_name = {
                entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
            }
            template = templates_by_name.get("tool_use") or templates_by_name.get("default")
        if isinstance(template, str) and template:
            return template
    # Mistral's own tokenizers have their formats in code, tools among them.
    return "[TOOL_CALLS] tools" if (folder / "tekken.json").is_file() else None


def supports_tools(folder: Path, engine_args: Mapping[str, Any]) -> bool:
    """Whether a model that is served with these arguments takes tools."""
    if engine_args.get("enable_auto_tool_choice") is False:
        return False
    if "tool_call_parser" in engine_args:
        return bool(engine_args["tool_call_parser"])
    return served_parsers(folder, engine_args).tool is not None


def tools_unsupported_message(model: str | None = None) -> str:
    """The error message for a request with tools to a model that takes none."""
    return (
        f"The model {f'{model!r} ' if model else ''}takes no tools: its chat template does not mention them. Use a model whose "
        "template supports tools, or ask for JSON (`response_format` of the type json_schema). Whoever serves it can set "
        "engine_args.chat_template to a template with tools."
    )


def explain_refusal(message: str, model: str | None = None) -> str:
    """Replace vLLM's message about tools at a model without a tool parser; other messages stay as they are."""
    return tools_unsupported_message(model) if REFUSES_TOOLS.search(message, 0, MAX_MESSAGE_CHARS) else message


def _tool_parser(model_type: str, template: str, tokenizer: str) -> tuple[str | None, str]:
    if not re.search(r"\btools\b", template):
        return None, "the chat template does not mention tools"
    for rule in TOOL_RULES:
        if _fits(rule, model_type, template, tokenizer):
            return rule.parser, _reason(rule, model_type)
    return (
        FALLBACK_TOOL_PARSER,
        "unknown tool format: calls that must be made are constrained to JSON, others stay text",
    )


def _reasoning_parser(model_type: str, template: str, tokenizer: str) -> tuple[str | None, str]:
    for rule in REASONING_RULES:
        if _fits(rule, model_type, template, tokenizer):
            return rule.parser, _reason(rule, model_type)
    prompt = template.rpartition("add_generation_prompt")[2] if "add_generation_prompt" in template else ""
    if (
        "<think>" in prompt
        and "thinking" not in template
        and _fits(THINKING_PROMPT_RULE, model_type, template, tokenizer)
    ):
        return THINKING_PROMPT_RULE.parser, "the generation prompt opens a <think> block"
    if "<think>" in template:
        return None, "the template mentions <think>, but the family is not known to think by default"
    return None, "the chat template has no reasoning"


def _fits(rule: Rule, model_type: str, template: str, tokenizer: str) -> bool:
    return (
        (not rule.families or model_type.startswith(rule.families))
        and all(mark in template for mark in rule.template_marks)
        # JSON files may escape what is not ASCII.
        and all(token in tokenizer or json.dumps(token)[1:-1] in tokenizer for token in rule.tokens)
    )


def _reason(rule: Rule, model_type: str) -> str:
    causes = [f"family {model_type}"] if rule.families else []
    causes += [f"{' and '.join(rule.template_marks)} in the chat template"] if rule.template_marks else []
    return ", ".join(causes)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
