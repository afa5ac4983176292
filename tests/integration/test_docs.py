"""The shell and Python blocks of README, tutorial and guides run as written, page by page in one home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from documentation import PAGES, REPOSITORY, Block, blocks

from tandem.cluster.ports import free_ports
from tandem.settings import child_environment

TIMEOUT_S = 900
ORDER = ("README.md", "docs/guides/data.md", "docs/guides/training.md")
"""These make the datasets and models that the other pages use."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A user who follows the documentation: a working directory, a home and a port."""

    folder: Path
    port: int

    def run(self, block: Block) -> None:
        """Run one block; fails with its output if a command of it fails."""
        text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(block.page),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{block.page}:\n{text}\n{done.stdout[-6000:]}"

    def environment(self, page: str) -> dict[str, str]:
        """Of the commands: this environment's programs first; README, which makes what guides make too, has a home of its own."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        folder = self.folder / ("home-readme" if page == "README.md" else "home")
        home = {"TANDEM_HOME": str(folder), "TANDEM_PORT": str(self.port)}
        return child_environment({"PATH": path, "RAY_ADDRESS": None, "COLUMNS": "160", **home})


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("reader")
    for name in ("train_apps", "serve_apps"):
        (folder / name).symlink_to(REPOSITORY / name)
    words = [f"Line {number} of a text about os.path.join and other functions.\n" for number in range(3000)]
    (folder / "corpus.txt").write_text("".join(words))
    rows = [{"prompt": f"What is line {number}?", "answer": f"It is about {number}."} for number in range(400)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:20]))
    return Reader(folder, free_ports(1)[0])


@pytest.mark.slow  # 15 minutes: it trains, fine-tunes and serves as the pages say
@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("page", [*ORDER, *(page for page in PAGES if page not in ORDER)])
def test_commands_of_a_page_run_as_written(page: str, reader: Reader) -> None:
    for block in blocks(page):
        if block.language in ("sh", "python") and block.reason is None:
            reader.run(block)
