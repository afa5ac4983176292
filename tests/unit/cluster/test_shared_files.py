"""Nodes that see other files are named before a job or an app starts; those that do not answer or are cordoned are not asked."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tandem.cluster.health.cordons import Cordon, write_cordon
from tandem.cluster.shared_files import _look, check_same_files
from tandem.errors import ClusterError


class Nodes:
    """A cluster whose nodes see the folders that they are told to, or do not answer."""

    def __init__(self, patch: pytest.MonkeyPatch, **sees: Path | None) -> None:
        self.sees = {name.replace("_", "."): root for name, root in sees.items()}
        self.asked: list[str] = []
        self.canceled: list[Any] = []
        listed = [
            {"NodeID": f"{number:056x}", "NodeManagerAddress": address, "Alive": True, "Resources": {}}
            for number, address in enumerate(self.sees)
        ]
        patch.setattr(ray, "nodes", lambda: listed)
        patch.setattr(ray, "remote", lambda **options: lambda function: SimpleNamespace(options=self.options))
        patch.setattr(ray, "wait", lambda tasks, **how: ([task for task in tasks if task[1] is not None], []))
        patch.setattr(ray, "get", lambda task: task[1])
        patch.setattr(ray, "cancel", self.canceled.append)

    def options(self, scheduling_strategy: Any) -> Any:
        address = list(self.sees)[int(scheduling_strategy.node_id, 16)]

        def remote(token: str, folders: list[str]) -> tuple[str, Any]:
            self.asked.append(address)
            root = self.sees[address]
            if root is None:
                return address, None
            word, missing = _look(str(root / Path(token).name), folders)
            return address, (word, tuple(missing))

        return SimpleNamespace(remote=remote)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o700)
    (tmp_path / "other").mkdir()
    return tmp_path / "home"


def test_nodes_with_another_home_or_without_a_folder_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, **{"10_0_0_1": home, "10_0_0_2": home.parent / "other"})
    with pytest.raises(ClusterError, match=r"home \(TANDEM_HOME\) is another folder on 10\.0\.0\.2"):
        check_same_files(home)
    Nodes(monkeypatch, **{"10_0_0_1": home, "10_0_0_2": home})
    with pytest.raises(ClusterError, match=r"/no/model is not there on 10\.0\.0\.1"):
        check_same_files(home, [Path("/no/model")])
    check_same_files(home, [home])
    assert not list(home.glob(".same-files-*"))


def test_a_node_that_does_not_answer_is_left_to_ray(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(monkeypatch, **{"10_0_0_1": home, "10_0_0_2": None})
    check_same_files(home)
    assert [task[0] for task in nodes.canceled] == ["10.0.0.2"]


def test_cordoned_nodes_and_a_single_machine_are_not_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = home.parent / "other"
    write_cordon(Cordon(node="10.0.0.2", reason="no NFS", by="ann", at=datetime.now(UTC)))
    nodes = Nodes(monkeypatch, **{"10_0_0_1": home, "10_0_0_2": other, "10_0_0_3": home})
    check_same_files(home)
    assert sorted(nodes.asked) == ["10.0.0.1", "10.0.0.3"]
    nodes = Nodes(monkeypatch, **{"10_0_0_1": other})
    check_same_files(home)
    assert nodes.asked == []
