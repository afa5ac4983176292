"""MkDocs hooks: pages generated from the code (CLI, config keys, HTTP routes), and pages that lie outside docs/.

Generated pages exist only in the build, so they cannot differ from the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tandem import config as configs
from tandem.cli.main import app
from tandem.config.training import sweep
from tandem.engine.routes import ENGINE_ROUTES
from tandem.gateway.app import create_app
from tandem.registry import Registry, RegistryAddress

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = (
    ("Training job", "TrainConfig", "`tandem train submit --config FILE`, `train_apps/*.py`"),
    ("Served app", "ServeConfig", "`tandem serve up --config FILE`, `args` of `serve_apps/openai.yaml`"),
    ("Batch run", "BatchConfig", "`tandem batch run --config FILE`"),
    (
        "Scheduling",
        "SchedulingConfig",
        "`scheduling` of a served app: the [scheduler](../concepts/scheduling.md) of its cluster",
    ),
    (
        "Scheduling of a job",
        "JobSchedulingConfig",
        "`scheduling` of a training job: the [scheduler](../concepts/scheduling.md), for one job",
    ),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the measurements of bench/results, and an index of the decisions."""
    pages = {
        "reference/cli.md": cli_page(),
        "reference/config.md": config_page(),
        "reference/http.md": http_page(),
        "adr/index.md": adr_page(),
    }
    for path in sorted((ROOT / "bench" / "results").glob("*.md")):
        pages[f"benchmarks/{path.name}"] = path.read_text()
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn links to the measurements into links to their pages in the site."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+bench/results/([\w-]+\.md)", rf"]({up}benchmarks/\1", markdown)


def cli_page() -> str:
    """Every command with its arguments and options."""
    lines = ["# Command line", "", "Each command has `--help` with the same text.", ""]
    root = typer.main.get_command(app)
    for path, command in commands(root, ("tandem",)):
        lines += [f"## `{' '.join(path)}`", "", inspect.cleandoc(command.help or ""), ""]
        rows = [row for parameter in command.params if (row := parameter_row(parameter))]
        if rows:
            lines += ["| argument or option | meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The commands that can be run, depth first."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        if not child.hidden:
            yield from commands(child, (*path, name))


def parameter_row(parameter: Any) -> str:
    """One row of a command's table."""
    if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
        return ""
    if parameter.param_type_name == "argument":
        name = f"`{(parameter.metavar or parameter.name.upper())}`"
    else:
        metavar = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
        name = ", ".join(f"`{option}{metavar}`" for option in (*parameter.opts, *parameter.secondary_opts))
    return f"| {cell(name)} | {cell(getattr(parameter, 'help', None) or '')} |"


def config_page() -> str:
    """Every key of the YAML files, with type, default and meaning."""
    lines = [
        "# Config keys", "",
        "Unknown keys are refused with the nearest valid one. `--set a.b=c` changes one value on the command line.", "",
    ]  # fmt: skip
    for title, name, usage in CONFIGS:
        lines += [f"## {title}", "", f"Used by {usage}.", ""]
        lines += list(config_tables(getattr(configs, name), "", set()))
    lines += ["## Sweep", "", inspect.cleandoc(sweep.__doc__ or ""), ""]
    return "\n".join(lines)


def config_tables(cls: type, prefix: str, seen: set[type]) -> Iterator[str]:
    """A table of one config class, then those of the classes nested in it."""
    if cls in seen:
        return
    seen.add(cls)
    if prefix:
        yield f"### `{prefix.rstrip('.')}`"
        yield ""
    yield inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    yield ""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    documented = field_docs(cls)
    nested = []
    for field in dataclasses.fields(cls):
        meaning = cell(documented.get(field.name, ""))
        yield f"| `{prefix}{field.name}` | `{cell(str(field.type))}` | {default(field)} | {meaning} |"
        for word in re.findall(r"\w+", str(field.type)):
            inner = getattr(configs, word, None)
            if inspect.isclass(inner) and dataclasses.is_dataclass(inner):
                nested.append((f"{prefix}{field.name}{'[]' if 'tuple' in str(field.type) else ''}.", inner))
    yield ""
    for path, inner in nested:
        yield from config_tables(inner, path, seen)


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = inspect.cleandoc(following.value.value).replace("\n", " ")
    return found


def default(field: dataclasses.Field[Any]) -> str:
    """A field's default, as YAML readers expect it."""
    if field.default is not dataclasses.MISSING:
        value = field.default
        if value is None or isinstance(value, bool):
            value = {None: "unset", True: "true", False: "false"}[value]
        return f"`{value}`" if value != "" else '`""`'
    if field.default_factory is not dataclasses.MISSING:
        return "its defaults" if dataclasses.is_dataclass(field.default_factory) else "empty"
    return "required"


def http_page() -> str:
    """Every route of the gateway."""
    tasks = {route.path: route.task for route in ENGINE_ROUTES}
    lines = [
        "# HTTP routes", "",
        "Clients talk to the gateway only. See [Clients](../guides/clients.md).", "",
        "| method | route | answered by | needs a model that can |", "|---|---|---|---|",
    ]  # fmt: skip
    for path, methods in sorted(gateway_routes()):
        for method in methods:
            owner = "the model's engine" if path in tasks else "the gateway"
            lines.append(f"| {method} | `{path}` | {owner} | {tasks.get(path) or ''} |")
    return "\n".join([*lines, ""])


def gateway_routes() -> set[tuple[str, tuple[str, ...]]]:
    """Paths and methods of the gateway's app."""
    # Only its list of routes is read: the registry is never opened.
    registry = Registry.at(RegistryAddress(url="sqlite://", identity=""))
    gateway = create_app(models=(), watch=None, registry=registry)  # type: ignore[arg-type]
    return {
        (prefix + route.path, tuple(sorted((route.methods or {"GET"}) - {"HEAD"})))
        for prefix, route in routes_below(gateway.routes)
    }


def routes_below(routes: Iterable[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The routes, and those of mounted apps with the path that they are mounted at."""
    for route in routes:
        if hasattr(route, "methods"):
            yield prefix, route
        else:
            yield from routes_below(getattr(route, "routes", ()), prefix + getattr(route, "path", ""))


def adr_page() -> str:
    """The decisions, by number."""
    lines = [
        "# Architecture decisions",
        "",
        "One page for each decision: what, why (with numbers), and what else was considered.",
        "",
    ]
    for path in sorted((ROOT / "docs" / "adr").glob("[0-9]*.md")):
        title = path.read_text().split("\n", 1)[0].lstrip("# ")
        title = re.sub(r"^\d+[.:]\s*", "", title)
        lines.append(f"- [{path.name[:4]}: {title}]({path.name})")
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
