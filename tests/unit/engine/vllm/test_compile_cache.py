"""Folders of compiled code: private to the user."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from tandem.engine.vllm.compile_cache import FOLDERS, compile_cache_environment, cpu_kind
from tandem.errors import EngineError


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FOLDERS, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"):
        monkeypatch.delenv(name, raising=False)


def test_compile_caches_are_private_folders_below_the_home(tandem_home: Path) -> None:
    root = tandem_home / "cache" / "compile" / f"{os.getuid()}-{cpu_kind()}"
    found = compile_cache_environment()
    assert {name: Path(found[name]) for name in FOLDERS} == {name: root / folder for name, folder in FOLDERS.items()}
    for folder in (root, *root.iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert found["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"


def test_cache_folders_set_by_the_user_stay(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    found = compile_cache_environment()
    assert set(found) == set(FOLDERS) - {"TORCHINDUCTOR_CACHE_DIR"}
    for name in FOLDERS:
        monkeypatch.setenv(name, "/elsewhere")
    assert compile_cache_environment() == {}


def test_a_folder_that_others_can_write_is_refused(tandem_home: Path) -> None:
    compile_cache_environment()
    open_folder = tandem_home / "cache" / "compile" / f"{os.geteuid()}-{cpu_kind()}" / "inductor"
    open_folder.chmod(0o777)
    with pytest.raises(EngineError, match=r"cannot be kept.*chmod 0700.*TORCHINDUCTOR_CACHE_DIR"):
        compile_cache_environment()


@pytest.mark.parametrize(("part", "mode"), [("", 0o2770), ("", 0o775), ("cache", 0o777), ("cache/compile", 0o2775)])
def test_where_a_group_could_replace_the_folder_it_is_in_the_users_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, mode: int
) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "own"))
    # Below tmp_path, which has mode 0700, nobody else could reach the folder.
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        Path(top).chmod(0o755)
        home = Path(top) / "home"
        (home / "cache" / "compile").mkdir(parents=True)
        monkeypatch.setenv("TANDEM_HOME", str(home))
        here = home / "cache" / "compile" / f"{os.geteuid()}-{cpu_kind()}"
        assert {Path(compile_cache_environment()[name]).parent for name in FOLDERS} == {here}
        (home / part).chmod(mode)
        own = tmp_path / "own" / "compile" / cpu_kind()
        assert {Path(compile_cache_environment()[name]).parent for name in FOLDERS} == {own}
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_in_a_home_of_another_user_it_is_in_the_users_own_cache(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "own"))
    os.chown(tandem_home, 65534, 65534)
    found = compile_cache_environment()
    assert all(Path(found[name]).is_relative_to(tmp_path / "own") for name in FOLDERS)
    assert not (tandem_home / "cache").exists()


def test_where_no_folder_can_be_made_it_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot be kept: .*file.*Set TANDEM_HOME, or each of"):
        compile_cache_environment()
