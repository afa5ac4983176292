"""What may import what, checked on the sources and in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "tandem"
HEAVY = ("torch", "vllm", "transformers", "peft", "deepspeed")


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Each module of the package: its path below it, and its syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(), filename=str(path))


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, wherever it does, with the line; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def run_python(code: str) -> str:
    """The output of a fresh interpreter in the repository root."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_layers_hold():
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("vllm", {"engine/vllm/engine.py", "engine/vllm/arguments.py", "engine/vllm/cpu.py"}),
        ("deepspeed", {"train/parallel/deepspeed.py"}),
        ("ray.train", {"train/worker.py", "train/supervision/attempts.py"}),
        ("ray.tune", {"jobs/tune.py"}),
        ("wandb", {"train/reporting/metrics.py"}),
        ("mlflow", {"train/reporting/metrics.py"}),
        ("train_apps", set()),
        ("serve_apps", set()),
        ("examples", set()),
    ],
)
def test_a_library_is_imported_only_at_its_home(library, homes):
    strays = [
        f"{path}:{line}"
        for path, tree in sources()
        if path not in homes
        for name, line in imported(tree)
        if name == library or name.startswith(f"{library}.")
    ]
    assert strays == []


def test_only_settings_reads_the_environment():
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    strays = [
        f"{path}:{node.lineno}"
        for path, tree in sources()
        if path != "settings.py"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", None) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    ]
    assert strays == []


def test_platform_is_still_the_standard_librarys():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert run_python("import platform; print(platform.python_version())") == sys.version.split()[0]


@pytest.mark.parametrize(
    "module",
    ["gateway.app", "jobs", "registry", "cli.main", "cli.doctor", "cli.chat", "config", "settings", "storage"],
)
def test_what_must_start_fast_loads_no_heavy_library(module):
    loaded = run_python(f"import sys, tandem.{module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded == "[]"


def test_importing_ray_loads_none_of_the_format_checkers_of_jsonschema():
    # Every process of Ray imports jsonschema, which imports the checkers that are installed; they take 1.5 s of CPU time.
    loaded = run_python("import sys, ray; print({name for name in sys.modules if name.startswith('rfc3')} or None)")
    assert loaded == "None", "requirements/overrides.txt keeps jsonschema[format] out of the lock"


def test_the_driver_of_a_training_job_does_not_import_what_only_its_workers_need():
    modules = "{'torch._dynamo', 'torch.distributed.fsdp', 'transformers', 'tandem.train.run'}"
    assert run_python(f"import sys, tandem.train.launch; print(set(sys.modules) & {modules} or None)") == "None"
