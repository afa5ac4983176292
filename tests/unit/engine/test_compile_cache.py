"""Where compiled code is kept, and that nobody else can write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tandem.engine.compile_cache import FOLDERS, compile_cache_environment, cpu_kind, private_folder
from tandem.errors import EngineError


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FOLDERS, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"):
        monkeypatch.delenv(name, raising=False)


def test_each_folder_is_private_and_below_the_home(tandem_home: Path) -> None:
    root = tandem_home / "cache" / "compile" / f"{os.getuid()}-{cpu_kind()}"
    found = compile_cache_environment()
    assert {name: Path(found[name]) for name in FOLDERS} == {name: root / folder for name, folder in FOLDERS.items()}
    for folder in (root, *root.iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert found["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"


def test_what_the_user_has_set_stays(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    found = compile_cache_environment()
    assert set(found) == set(FOLDERS) - {"TORCHINDUCTOR_CACHE_DIR"}
    for name in FOLDERS:
        monkeypatch.setenv(name, "/elsewhere")
    assert compile_cache_environment() == {}


def test_a_folder_that_others_could_write_to_is_closed(tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    assert stat.S_IMODE(private_folder(open_folder).stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_and_a_link_are_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(EngineError, match="TORCHINDUCTOR_CACHE_DIR"):
        private_folder(link)
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot be kept"):
        private_folder(tmp_path / "file")
    if os.getuid() == 0:
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        os.chown(theirs, 65534, 65534)
        with pytest.raises(EngineError, match="uid 65534"):
            private_folder(theirs)
