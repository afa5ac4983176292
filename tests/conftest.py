"""What the tests share: one home, one Ray cluster, both for the whole session, and the models they train."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from postgresql import Server, postgresql
from s3_fixtures import s3 as s3

from tandem import settings as environment
from tandem.cluster.local import LocalCluster, authentication

STARTED = time.monotonic()
SHOWN_S = 5.0
"""Seconds: files with less are added up in the page of `--times`."""
# Ray reads its authentication mode when it is first imported, which a test module may do before a cluster starts.
environment.export(authentication())
# pytest-xdist sets these for its processes, and then every terminal of the tests would have 80 columns.
for name, value in (("COLUMNS", "80"), ("LINES", "24")):
    environment.forget(name, value)
# Each test has a home of its own, and would compile the same kernels again: about 15 s for each engine.
COMPILED = Path.home() / ".cache" / "tandem-tests"
environment.export(
    {
        "TORCHINDUCTOR_CACHE_DIR": str(COMPILED / "inductor"),
        "TRITON_CACHE_DIR": str(COMPILED / "triton"),
        "VLLM_CACHE_ROOT": str(COMPILED / "vllm"),
    }
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--times=FILE`: where the time went, by test file, as a page."""
    parser.addoption("--times", type=Path, help="write the seconds of each test file to this page")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write that page."""
    path: Path | None = config.getoption("times")
    if path is None:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.split("::")[0]] += report.duration
    counts = ", ".join(
        f"{len(terminalreporter.stats[kind])} {kind}"
        for kind in ("passed", "failed", "skipped", "error")
        if terminalreporter.stats.get(kind)
    )
    minutes = f"{(time.monotonic() - STARTED) / 60:.0f} minutes"
    rows = [f"| `{file}` | {spent:.0f} |" for file, spent in seconds.most_common() if spent >= SHOWN_S]
    rest = sum(spent for spent in seconds.values() if spent < SHOWN_S)
    target = "test" if "not slow" in config.getoption("markexpr") else "test-all"
    path.write_text(
        f"# Test times\n\nMade by `make {target} ARGS=--times={path}` on {os.cpu_count()} cores: {counts} in {minutes}. "
        "Set-up counts for the file whose test needed it first; files run side by side where they share no servers.\n\n"
        f"| file | seconds |\n|---|---:|\n" + "\n".join([*rows, f"| all others | {rest:.0f} |"]) + "\n"
    )


INDEPENDENT = frozenset(
    f"tests/integration/test_{name}.py"
    for name in (
        "adapter_sources", "batch_s3", "checkpoint_s3", "cluster", "container_start", "data_s3", "deepspeed", "docs", "engines",
        "exports_s3", "failed_start", "killed_saves", "kubernetes_pod", "model_sources", "node_health", "objectives_world",
        "parity", "private_files", "quickstart", "resume_layouts", "serve_commands", "serve_config", "serve_drain", "serve_tls",
        "sharded_import", "train_world",
    )
)  # fmt: skip
"""Integration tests that start all they need themselves. The others share a Ray cluster, an app and an engine."""
ON_HOSTS = frozenset(
    f"tests/integration/test_{name}.py" for name in ("node_failures", "ray_up", "slurm", "slurm_runner", "two_nodes")
)
"""Likewise, one after another: their hosts are network namespaces with the same addresses."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2`: integration tests that share servers in one process, the others and unit tests by file beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file in ON_HOSTS:
                return "hosts"
            return "shared" if file.startswith("tests/integration/") and file not in INDEPENDENT else file

    return ByServers(config, log)


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A TANDEM_HOME for the whole session, in the environment."""
    home = tmp_path_factory.mktemp("home")
    environment.export({"TANDEM_HOME": str(home)}, override=True)
    yield home
    environment.forget("TANDEM_HOME", str(home))


@pytest.fixture
def tandem_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TANDEM_HOME for one test, in the environment."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("TANDEM_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """One PostgreSQL server for the whole session."""
    with postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def cluster(session_home: Path) -> Iterator[LocalCluster]:
    """A local Ray cluster with 10 logical CPUs, for the whole session."""
    started = LocalCluster.start(num_cpus=10)
    yield started
    started.stop()


@pytest.fixture(scope="session")
def ray_cluster(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The session's cluster, with this process connected to it."""
    import ray

    ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()


@pytest.fixture
def hub(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server that speaks the Hugging Face hub's API, in the environment; nobody is logged in, and the home is empty."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Read when it was imported, which another test may have caused.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tandem_home / "token"))
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
