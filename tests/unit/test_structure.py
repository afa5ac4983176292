"""Sizes that keep the package readable: lines of a function, modules of a folder."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "platform" / "tandem"
MAX_FUNCTION_LINES = 80
MAX_MODULES = 15
"""Modules of a folder that has no sub-folders; `__init__` is not counted."""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and inner functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_function_is_longer_than_80_lines() -> None:
    long = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in functions(ast.parse(path.read_text())):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                long[f"{path.relative_to(PACKAGE).as_posix()}:{function.name}"] = lines
    assert long == {}


def test_no_folder_without_sub_folders_has_more_than_15_modules() -> None:
    large = {}
    for folder in (PACKAGE, *(each for each in PACKAGE.rglob("*") if each.is_dir() and each.name != "__pycache__")):
        if any(each.is_dir() and each.name != "__pycache__" for each in folder.iterdir()):
            continue
        modules = [each for each in folder.glob("*.py") if each.name != "__init__.py"]
        if len(modules) > MAX_MODULES:
            large[folder.relative_to(PACKAGE).as_posix()] = len(modules)
    assert large == {}
