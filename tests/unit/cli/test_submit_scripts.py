"""Recipes are valid, and a submit script refuses the job of another one before it starts anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem.sdk.session import recipe
from tandem.settings import child_environment

REPOSITORY = Path(__file__).parents[3]
RECIPES = REPOSITORY / "train_apps" / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_a_config(path: Path) -> None:
    assert recipe(path.stem).name.startswith("quickstart")


@pytest.mark.parametrize(
    ("script", "config", "said"),
    [
        (
            "dpo",
            "quickstart_sft",
            "objective is 'next_token' in a dpo job. Set objective: dpo, or use train_apps/sft.py.",
        ),
        ("sft", "quickstart_dpo", "objective is 'dpo' in a sft job. Use train_apps/dpo.py."),
    ],
)
def test_a_script_refuses_the_job_of_another(script: str, config: str, said: str, tandem_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, f"train_apps/{script}.py", "--config", str(RECIPES / f"{config}.yaml")],
        cwd=REPOSITORY, env=child_environment({"COLUMNS": "300"}), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and said in " ".join((done.stdout + done.stderr).split())
