"""Selection of vLLM's tool and reasoning parsers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.engine.vllm.parsers import (
    DEEPSEEK_CALLS,
    FALLBACK_TOOL_PARSER,
    REASONING_RULES,
    THINKING_PROMPT_RULE,
    TOOL_RULES,
    explain_refusal,
    read_parsers,
    select_parsers,
    served_parsers,
    supports_tools,
    tool_arguments,
)

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
QWEN3 = TOOLS + "<tool_call>{}</tool_call>{% if not enable_thinking %}<think>\n</think>{% endif %}"
TOKENS = '"<tool_call>" "</tool_call>" "<think>" "</think>" "<|python_tag|>" "[TOOL_CALLS]"'

REGISTRY = """
import json
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
print(json.dumps([ToolParserManager.list_registered(), ReasoningParserManager.list_registered()]))
"""


def test_vllm_has_every_parser_that_may_be_selected() -> None:
    done = subprocess.run([sys.executable, "-c", REGISTRY], capture_output=True, text=True, timeout=120, check=True)
    tools, reasoning = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert {rule.parser for rule in TOOL_RULES} | {FALLBACK_TOOL_PARSER} <= set(tools)
    assert {rule.parser for rule in (*REASONING_RULES, THINKING_PROMPT_RULE)} <= set(reasoning)


@pytest.mark.parametrize(
    ("model_type", "template", "tool", "reasoning"),
    [
        ("qwen2", TOOLS + "<tool_call>", "hermes", None),
        ("qwen3", QWEN3, "hermes", "qwen3"),
        ("qwen3_moe", TOOLS + "<tool_call><function=", "qwen3_coder", None),
        ("llama", TOOLS + "<tool_call>", "hermes", None),
        ("llama", TOOLS + "<|python_tag|>", "llama3_json", None),
        ("llama", TOOLS + '{"name": function name, "parameters": {}}', "llama3_json", None),
        ("llama4", TOOLS, "llama4_pythonic", None),
        ("mistral", TOOLS + "[TOOL_CALLS]", "mistral", None),
        ("gpt_oss", TOOLS, "openai", "openai_gptoss"),
        ("deepseek_v3", TOOLS + DEEPSEEK_CALLS + "```json", None, None),
        ("granitemoehybrid", TOOLS + "<tool_call>", "granite4", None),
        ("glm4_moe", TOOLS + "<tool_call><arg_key><think>", "glm47", "glm45"),
        ("qwen2", "{% if add_generation_prompt %}<think>\n{% endif %}", None, "deepseek_r1"),
        ("novel", TOOLS, FALLBACK_TOOL_PARSER, None),
        ("llama", "{{ messages }}", None, None),
    ],
)
def test_a_model_gets_the_parsers_of_its_format(
    model_type: str, template: str, tool: str | None, reasoning: str | None
) -> None:
    found = select_parsers(model_type, template, TOKENS)
    # DeepSeek's tokens are not among these: a parser that needs them would refuse every request.
    assert (found.tool, found.reasoning) == (tool if "deepseek" not in model_type else FALLBACK_TOOL_PARSER, reasoning)
    assert found.tool_reason and found.reasoning_reason and found.chat


def test_a_parser_whose_tokens_the_tokenizer_lacks_is_not_selected() -> None:
    template = TOOLS + DEEPSEEK_CALLS
    assert select_parsers("deepseek_v3", template, json.dumps(DEEPSEEK_CALLS)).tool == "deepseek_v31"
    assert select_parsers("deepseek_v3", template + "```json", DEEPSEEK_CALLS).tool == "deepseek_v3"
    assert select_parsers("llama", TOOLS + "<|python_tag|>", "").tool == FALLBACK_TOOL_PARSER
    assert select_parsers("qwen3", QWEN3, "").reasoning is None


def test_a_folder_is_read_wherever_its_template_is(tmp_path: Path) -> None:
    assert (read_parsers(tmp_path).tool, read_parsers(tmp_path).chat) == (None, False)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    named = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": TOOLS + "<tool_call>"}]
    for template in (TOOLS + "<tool_call>", named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert read_parsers(tmp_path).tool == "hermes"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_parsers(tmp_path).tool is None
    given = tmp_path / "given.jinja"
    given.write_text(TOOLS)
    assert read_parsers(tmp_path, str(given)).tool == read_parsers(tmp_path, TOOLS).tool == FALLBACK_TOOL_PARSER
    (tmp_path / "tokenizer_config.json").write_text("{damaged")
    (tmp_path / "config.json").write_text("[]")
    assert read_parsers(tmp_path).chat


def test_arguments_of_the_engine_decide_whether_tools_are_taken(tmp_path: Path) -> None:
    assert not supports_tools(tmp_path, {})
    assert supports_tools(tmp_path, {"tool_call_parser": "hermes"}) and supports_tools(
        tmp_path, {"chat_template": TOOLS}
    )
    (tmp_path / "chat_template.jinja").write_text(TOOLS)
    assert supports_tools(tmp_path, {}) and not supports_tools(tmp_path, {"tool_call_parser": None})
    assert not supports_tools(tmp_path, {"enable_auto_tool_choice": False})


def test_enable_auto_tool_choice_and_the_parser_are_set_together() -> None:
    selected = select_parsers("qwen2", TOOLS + "<tool_call>", "")
    both = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    for given in ({}, {"enable_auto_tool_choice": True}, {"enable_auto_tool_choice": None}):
        assert tool_arguments(selected, given) == both
    assert tool_arguments(selected, {"enable_auto_tool_choice": False}) == {}
    assert tool_arguments(selected, {"tool_call_parser": "mistral"}) == {"enable_auto_tool_choice": True}
    assert tool_arguments(selected, {"tool_call_parser": None}) == {"enable_auto_tool_choice": False}
    assert tool_arguments(selected, both) == {}
    assert tool_arguments(select_parsers("qwen2", None, ""), {}) == {}


def test_template_and_tokens_of_another_tokenizer_are_read(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "tokenizer"
    for folder, template in ((model, "{{ messages }}"), (other, TOOLS + "[TOOL_CALLS]")):
        folder.mkdir()
        (folder / "chat_template.jinja").write_text(template)
    (other / "tokenizer.json").write_text("[TOOL_CALLS]")
    assert served_parsers(model, {}).tool is None
    assert served_parsers(model, {"tokenizer": str(other)}).tool == "mistral"
    assert supports_tools(model, {"tokenizer": str(other)})
    assert not supports_tools(model, {"tokenizer": "org/name"})


def test_a_refusal_of_tools_names_the_model_and_no_option_of_vllm() -> None:
    said = explain_refusal('tool_choice="required" requires --tool-call-parser to be set', "tiny")
    assert "'tiny' takes no tools" in said and "--" not in said
    assert explain_refusal("Something else.", "tiny") == "Something else."
