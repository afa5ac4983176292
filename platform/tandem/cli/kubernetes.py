"""`tandem kubernetes`: manifests of clusters, apps and training jobs for the KubeRay operator; apply, list and delete them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem.cli.serve import read_config
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.kubernetes.client import Kubernetes
from tandem.cluster.kubernetes.manifests import (
    KINDS,
    ServeSubmission,
    TrainSubmission,
    cluster_manifests,
    serve_manifests,
    to_yaml,
    train_manifests,
)
from tandem.cluster.kubernetes.pods import Manifest
from tandem.config import ListenConfig, TrainConfig, located
from tandem.config.check import one_of
from tandem.config.kubernetes import KubernetesSite, check_name
from tandem.config.load import apply_overrides, from_dict, read_yaml
from tandem.errors import ConfigError
from tandem.sdk.console import console
from tandem.settings import settings

SiteOption = Annotated[
    Path | None,
    typer.Option("--site", help="The site's config (YAML); kubernetes.yaml of TANDEM_HOME where there is one."),
]
SiteSetOption = Annotated[
    list[str], typer.Option("--site-set", metavar="KEY=VALUE", help="Change one value of the site's config.")
]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the config.")
]
NameOption = Annotated[str, typer.Option("--name", "-n", help="Name in Kubernetes.")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="With submit: the API server checks all, and keeps nothing.")
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="With submit: take over what others manage, as the autoscaler the numbers of pods."),
]

kubernetes_app = typer.Typer(no_args_is_help=True, help="Train and serve on Kubernetes, by the KubeRay operator.")
submit_app = typer.Typer(no_args_is_help=True, help="Apply a cluster, an app or a training job.")
render_app = typer.Typer(no_args_is_help=True, help="Print the manifests that `submit` would apply.")
kubernetes_app.add_typer(submit_app, name="submit")
kubernetes_app.add_typer(render_app, name="render")


def serve_command(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models as `tandem serve up` takes them, seen from the pods. None: the newest one."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The app as YAML (see serve_apps).")] = None,
    overrides: SetOption = [],  # noqa: B006
    name: NameOption = "tandem",
    site: SiteOption = None,
    site_overrides: SiteSetOption = [],  # noqa: B006
    check: CheckOption = False,
    force: ForceOption = False,
) -> None:
    """Serve models: a RayService. Applied again with another config, it changes the running app as `tandem serve deploy` does."""
    with friendly_errors(), located(config, overrides):
        found = read_site(site, site_overrides)
        values = serve_values(models, config, overrides)
        submission = ServeSubmission(name=check_name(name), app=values.get("app", "tandem"), values=values)
        _act(context, found, serve_manifests(found, submission), check=check, force=force)


def train_command(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", "-c", help="The job as YAML (see train_apps/recipes).")],
    overrides: SetOption = [],  # noqa: B006
    name: Annotated[str | None, typer.Option("--name", "-n", help="Name in Kubernetes; unset: the config's.")] = None,
    site: SiteOption = None,
    site_overrides: SiteSetOption = [],  # noqa: B006
    check: CheckOption = False,
    force: ForceOption = False,
) -> None:
    """Train: a RayJob with a cluster of its own, which ends with it. A failed cluster is replaced; the job resumes."""
    with friendly_errors(), located(config, overrides):
        found = read_site(site, site_overrides)
        values = apply_overrides(read_yaml(config), overrides)
        job = from_dict(TrainConfig, values)
        submission = TrainSubmission(
            name=check_name(name or job.name.lower().replace("_", "-").replace(".", "-")),
            values=values,
            workers=job.parallel.workers,
            gpus_per_worker=job.parallel.gpus_per_worker,
            cpus_per_worker=job.parallel.cpus_per_worker,
        )
        _act(context, found, train_manifests(found, submission), check=check, force=force)


def cluster_command(
    context: typer.Context,
    name: NameOption = "tandem",
    site: SiteOption = None,
    site_overrides: SiteSetOption = [],  # noqa: B006
    check: CheckOption = False,
    force: ForceOption = False,
) -> None:
    """Start a cluster for training and serving: a RayCluster with the pools data, serve and train."""
    with friendly_errors():
        found = read_site(site, site_overrides)
        _act(context, found, cluster_manifests(found, check_name(name)), check=check, force=force)


for group in (submit_app, render_app):
    group.command("serve")(serve_command)
    group.command("train")(train_command)
    group.command("cluster")(cluster_command)


@kubernetes_app.command("status")
def status_command(
    site: SiteOption = None,
    site_overrides: SiteSetOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the clusters, apps and training jobs of the namespace, as the operator sees them."""
    with friendly_errors():
        kubernetes = Kubernetes(read_site(site, site_overrides))
        runs = kubernetes.runs()
        if as_json:
            typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
            return
        if not runs:
            console.print(
                f"Nothing of Tandem is in the namespace {kubernetes.namespace}. `tandem kubernetes submit` applies it."
            )
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for column in ("KIND", "NAME", "STATE", "MESSAGE"):
            table.add_column(column, overflow="fold")
        for run in runs:
            table.add_row(run.what, run.name, run.state, escape(run.message))
        console.print(table)


@kubernetes_app.command("delete")
def delete_command(
    what: Annotated[str, typer.Argument(metavar="KIND", help="cluster, serve or train.")],
    name: Annotated[str, typer.Argument(help="Its name.")],
    site: SiteOption = None,
    site_overrides: SiteSetOption = [],  # noqa: B006
) -> None:
    """Delete a cluster, an app or a training job. What is in TANDEM_HOME and in databases stays."""
    with friendly_errors():
        one_of("KIND", what, KINDS)
        Kubernetes(read_site(site, site_overrides)).delete(what, name)
        console.print(f"{KINDS[what]} {escape(name)} is deleted; its pods end now.")


def read_site(path: Path | None, overrides: list[str]) -> KubernetesSite:
    """The site's config; ConfigError if a file that was named is not there."""
    own = settings().root / "kubernetes.yaml"
    file = path or (own if own.exists() else None)
    with located(file, overrides):
        return from_dict(KubernetesSite, apply_overrides(read_yaml(file) if file else {}, overrides))


def serve_values(models: list[str] | None, config: Path | None, overrides: list[str]) -> dict[str, Any]:
    """The app's config as Serve's arguments, checked; without what Kubernetes decides. ConfigError if `listen` is set."""
    values = apply_overrides(read_yaml(config) if config else {}, overrides)
    checked = read_config(models, config, overrides)
    if checked.listen != ListenConfig():
        raise ConfigError(
            "listen is set, and on Kubernetes every pod listens on port 8000 for its Service. Leave it out; TLS ends at the "
            "Ingress or Gateway (deploy/kubernetes/components)."
        )
    values.pop("listen", None)
    if models:
        values["models"] = [{"model": model} for model in models]
    return values


def _act(context: typer.Context, site: KubernetesSite, manifests: list[Manifest], *, check: bool, force: bool) -> None:
    """Print manifests or apply them, as the command's group says."""
    parent = context.parent
    if parent is not None and parent.info_name == "render":
        typer.echo(to_yaml(manifests), nl=False)
        return
    kubernetes = Kubernetes(site)
    kubernetes.apply(manifests, dry_run=check, force=force)
    for manifest in manifests:
        console.print(
            f"{manifest['kind']} {manifest['metadata']['name']} is {'accepted' if check else 'applied'} "
            f"(namespace {site.namespace})."
        )
    if not check:
        console.print("[dim]`tandem kubernetes status` tells how it is.[/]")
