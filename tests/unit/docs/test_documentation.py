"""The documentation agrees with the code: commands, options and config keys exist, and every block is run or says why not."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer.main
import yaml
from documentation import PAGES, REPOSITORY, Block, blocks

from tandem.cli.main import app
from tandem.config import (
    BatchConfig,
    JobSchedulingConfig,
    SchedulingConfig,
    ServeConfig,
    TrainConfig,
    from_dict,
)
from tandem.config.kubernetes import KubernetesSite
from tandem.config.slurm import SlurmSite
from tandem.errors import ConfigError

LANGUAGES = {"sh", "python", "yaml", "mermaid"}
BASE: dict[type, dict[str, Any]] = {
    TrainConfig: {"name": "a", "data": {"path": "b"}, "model": {"base": "c"}, "steps": 1, "batch_size": 8},
    ServeConfig: {"models": [{"model": "a"}]},
    SlurmSite: {},
    SchedulingConfig: {},
    JobSchedulingConfig: {},
    KubernetesSite: {},
    BatchConfig: {"input": "a.jsonl", "model": "b", "output": "c"},
}
ALL = [block for page in PAGES for block in blocks(page)]


def tandem_commands(block: Block) -> list[list[str]]:
    """The arguments of each `tandem` command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "tandem"]


def test_readme_has_at_most_200_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


def test_every_block_has_a_language_and_a_test_or_a_reason() -> None:
    assert {block.language for block in ALL} <= LANGUAGES
    assert all(block.reason is None or len(block.reason) > 10 for block in ALL)
    # A marker that is not directly above a block would be ignored.
    for page in PAGES:
        markers = (REPOSITORY / page).read_text().count("<!-- not run:")
        assert markers == sum(block.reason is not None for block in blocks(page)), page


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    root = typer.main.get_command(app)
    for block in blocks(page):
        for arguments in tandem_commands(block) if block.language == "sh" else []:
            command: Any = root
            context = None
            rest = arguments
            while hasattr(command, "commands"):
                assert rest and rest[0] in command.commands, f"{page}: tandem {' '.join(arguments)}"
                command, rest = command.commands[rest[0]], rest[1:]
            context = command.make_context("tandem", rest, resilient_parsing=True)
            assert context is not None


@pytest.mark.parametrize("page", PAGES)
def test_config_blocks_have_valid_keys_and_values(page: str) -> None:
    for block in blocks(page):
        if block.language != "yaml":
            continue
        values = yaml.safe_load(block.text)
        refusals = [refusal(kind, values) for kind in BASE]
        assert None in refusals, f"{page}:\n{block.text}\n" + "\n".join(map(str, refusals))


def refusal(kind: type, values: dict[str, Any]) -> str | None:
    """Why a config with these values is refused; None if it is not."""
    base = dict(BASE[kind])
    if kind is TrainConfig and "architecture" in values.get("model", {}):
        base["model"] = {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 128,
        }
    merged = {
        key: base[key] | value if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        for key, value in values.items()
    }
    if kind is TrainConfig and "mixture" in values.get("data", {}):
        merged["data"] = values["data"]
    try:
        from_dict(kind, base | merged)
    except ConfigError as error:
        return str(error)
    return None
