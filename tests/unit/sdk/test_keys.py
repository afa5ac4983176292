"""API keys from Python: a notebook makes one without a cluster, and wrong values and names are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_folders import small_model

import tandem
from tandem.auth import KeyStore, Role
from tandem.errors import ConfigError
from tandem.registry import Registry
from tandem.sdk.keys import Keys, ensure_api_key, operator


def test_a_session_makes_lists_rotates_and_revokes_keys_without_a_cluster(tandem_home: Path) -> None:
    with tandem.Session() as session:
        new = session.keys.create("notebook", tenant="lab", role="trainer", expires_in="12h")
        assert new.secret.startswith("tdm-") and new.key.role is Role.TRAINER and new.key.expires_at is not None
        assert session.keys.list(tenant="lab") == [new.key] and session.keys.list(tenant="other") == []
        second = session.keys.rotate("notebook", overlap="0s")
        assert session.keys.get("notebook").id == second.key.id
        assert session.keys.revoke(second.key.id).state(second.key.created_at) == "revoked"
        assert session.keys.list() == [] and len(session.keys.list(every=True)) == 2
    assert "@" in operator()


@pytest.mark.parametrize("values", [{"role": "root"}, {"expires_in": "soon"}, {"expires_in": "0"}])
def test_values_that_no_key_can_have_are_refused(tandem_home: Path, values: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Keys.open().create("notebook", **values)  # type: ignore[arg-type]
    assert Keys.open().list(every=True) == []


def test_a_model_that_is_not_registered_is_told_with_the_nearest(
    tandem_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Registry.open().register_model("my-model", small_model(tmp_path / "model"))
    Keys.open().create("right", models=["my-model", "my-model@1"])
    assert capsys.readouterr().err == ""
    new = Keys.open().create("typo", models=["my-modle"])
    captured = capsys.readouterr()
    assert "my-modle" in captured.err and "'my-model'" in captured.err and captured.out == ""
    assert new.key.models == ("my-modle",)


def test_the_key_of_a_home_is_made_once_and_sent_by_default(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tandem_home.chmod(0o700)
    monkeypatch.delenv("TANDEM_API_KEY", raising=False)
    assert tandem.api_key() == "tandem"
    file = ensure_api_key()
    assert file == tandem_home / "api_key" and file.stat().st_mode & 0o777 == 0o600
    made = tandem.api_key()
    assert KeyStore.open().accepts(made) and ensure_api_key() == file and tandem.api_key() == made
    (key,) = KeyStore.open().list()
    KeyStore.open().revoke(key.id, by="test")
    assert ensure_api_key() == file and tandem.api_key() != made
    monkeypatch.setenv("TANDEM_API_KEY", "tdm-mine")
    assert tandem.api_key() == "tdm-mine" and ensure_api_key() is None


def test_a_key_that_others_could_have_written_is_not_sent(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_API_KEY", raising=False)
    (tandem_home / "api_key").write_text("tdm-theirs")
    (tandem_home / "api_key").chmod(0o666)
    assert tandem.api_key() == "tandem"
