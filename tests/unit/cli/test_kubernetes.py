"""`tandem kubernetes`: manifests are printed without a cluster, applied with one, and wrong input is named before either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_api import KubernetesApi, documents, problems
from typer.testing import CliRunner

from tandem.cli.main import app

JOB = {
    "name": "My_SFT.1", "data": {"path": "pairs"}, "model": {"base": "base"}, "steps": 10, "batch_size": 8,
    "parallel": {"workers": 4, "gpus_per_worker": 1},
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TANDEM_HOME", str(folder))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["kubernetes", *arguments], env={"COLUMNS": "250"})
    return result.exit_code, result.stdout + result.stderr


def job_file(folder: Path, **changes: Any) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | changes))
    return str(path)


def test_a_training_job_is_rendered_with_the_homes_site_and_changed_values(home: Path) -> None:
    (home / "kubernetes.yaml").write_text("namespace: lab\ntrain: {gpus: 2}\n")
    status, shown = run("render", "train", "-c", job_file(home), "-s", "steps=20", "--site-set", "image=tandem:test")
    assert status == 0, shown
    files, job, budget = documents(shown)
    assert problems(files) == problems(job) == problems(budget) == []
    assert job["metadata"]["name"] == "my-sft-1" and job["metadata"]["namespace"] == "lab"
    assert yaml.safe_load(files["data"]["job.yaml"]) == JOB | {"steps": 20}
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 2
    assert group["template"]["spec"]["containers"][0]["image"] == "tandem:test"


def test_an_app_is_rendered_with_its_models_and_config(home: Path) -> None:
    config = home / "app.yaml"
    config.write_text("app: chat\ngateway: {replicas: 2}\n")
    status, shown = run("render", "serve", "my-model", "other", "-c", str(config), "-s", "gateway.replicas=3")
    assert status == 0, shown
    service, *_ = documents(shown)
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["name"] == "chat"
    assert application["args"] == {
        "app": "chat",
        "gateway": {"replicas": 3},
        "models": [{"model": "my-model"}, {"model": "other"}],
    }


def test_submit_applies_what_render_prints_and_status_and_delete_find_it(home: Path, tmp_path: Path) -> None:
    with KubernetesApi() as api:
        api.kubeconfig(tmp_path / "kubeconfig")
        status, shown = run("submit", "serve", "my-model", "--check")
        assert status == 0 and "RayService tandem is accepted" in shown and not api.objects
        status, shown = run("submit", "serve", "my-model")
        assert status == 0 and "RayService tandem is applied (namespace tandem)" in shown
        assert documents(run("render", "serve", "my-model")[1]) == list(api.objects.values())
        status, shown = run("status")
        assert status == 0 and shown.splitlines()[-1].split() == ["serve", "tandem", "starting"]
        assert run("status", "--json")[1].startswith("[")
        status, shown = run("delete", "serve", "tandem")
        assert status == 0 and not api.objects
        assert "Nothing of Tandem is in the namespace tandem" in run("status")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("render", "serve", "--site-set", "namespcae=a"), "Did you mean 'namespace'"),
        (("render", "serve", "--set", "gatewya.replicas=2"), "Did you mean 'gateway'"),
        (("render", "serve", "--set", "listen.port=9000"), "listens on port 8000"),
        (("render", "serve", "--name", "My App"), "small letters"),
        (("render", "serve", "--site", "missing.yaml"), "No config file at missing.yaml"),
        (("delete", "app", "tandem"), "cluster, serve, train"),
        (("submit", "serve"), "Set KUBECONFIG"),
    ],
)
def test_wrong_input_is_named(home: Path, arguments: tuple[str, ...], said: str) -> None:
    status, shown = run(*arguments)
    assert status != 0 and said in " ".join(shown.split())


def test_a_job_whose_workers_fit_no_pod_is_refused(home: Path) -> None:
    status, shown = run("render", "train", "-c", job_file(home))
    assert status == 2 and "--site-set train.gpus=1" in " ".join(shown.split())
    status, shown = run("render", "train", "-c", job_file(home, stpes=1))
    assert status == 2 and "Did you mean 'steps'" in " ".join(shown.split())
