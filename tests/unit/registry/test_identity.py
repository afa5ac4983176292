"""A registry's identity: a process on another node opens the registry it was told of, or none, and never makes one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from postgresql import Server

from tandem.db.database import initialise
from tandem.db.schema import REVISION
from tandem.errors import RegistryError, RegistryUnreachableError
from tandem.registry import Registry, RegistryAddress, is_shared, upgrade


def test_each_registry_has_an_identity_of_its_own_and_keeps_it(registry: Registry, tmp_path: Path) -> None:
    assert Registry(registry.url).identity == registry.identity
    assert Registry(f"sqlite:///{tmp_path}/another.db").identity != registry.identity


def test_a_registry_opens_by_its_address_and_after_pickling(registry: Registry) -> None:
    assert Registry.at(registry.address).revision() == registry.revision()
    copy = pickle.loads(pickle.dumps(registry))
    assert (copy.identity, copy.list()) == (registry.identity, [])


def test_another_registry_at_the_same_address_is_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"is another \(.{8}\) than the one expected \(0{8}\).*TANDEM_DATABASE_URL"):
        Registry.at(RegistryAddress(url=registry.url, identity="0" * 32)).revision()


def test_no_registry_is_made_where_one_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "other-node" / "tandem.db"
    with pytest.raises(RegistryError, match=r"There is no registry at sqlite:///.*TANDEM_DATABASE_URL"):
        Registry.at(RegistryAddress(url=f"sqlite:///{file}", identity="0" * 32)).revision()
    assert not file.parent.exists()


def test_a_job_on_a_node_without_the_registry_makes_none(tmp_path: Path) -> None:
    code = "from tandem.registry import Registry; Registry.open().list()"
    environment = {
        "TANDEM_HOME": str(tmp_path / "home"),
        "TANDEM_REGISTRY_ID": "0" * 32,
        "PYTHONPATH": ":".join(sys.path),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RegistryError: There is no registry at" in result.stderr
    assert not (tmp_path / "home").exists()


def test_a_postgresql_database_is_prepared_by_upgrade_alone(postgresql_server: Server) -> None:
    url = postgresql_server.create("prepared")
    with pytest.raises(RegistryError, match=r"has no registry in it yet. Run `tandem db upgrade`"):
        Registry(url)
    done = upgrade(url)
    assert (done.revision, done.identity) == (REVISION, Registry(url).identity)
    assert postgresql_server.password not in done.redacted_url
    assert upgrade(url) == done


def test_a_database_with_a_registry_is_not_initialised_again(postgresql_server: Server, tmp_path: Path) -> None:
    for url in (postgresql_server.create("initialised"), f"sqlite:///{tmp_path}/home/tandem.db"):
        made = initialise(url)
        assert made.identity == Registry(url).identity
        with pytest.raises(RegistryError, match=rf"has a registry already, at schema {REVISION}. `tandem db upgrade`"):
            initialise(url)
        assert Registry(url).identity == made.identity


def test_processes_that_upgrade_one_database_at_once_make_one_registry(postgresql_server: Server) -> None:
    url = postgresql_server.create("at_once")
    code = f"from tandem.registry import upgrade; print(upgrade({url!r}).identity)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate(timeout=120)[0] for process in processes}) == 1
    assert [process.returncode for process in processes] == [0] * 4


def test_a_postgresql_server_that_goes_and_comes_back_is_used_again(postgresql_server: Server) -> None:
    url = postgresql_server.create("away")
    upgrade(url)
    with Registry(url) as registry:
        postgresql_server.stop()
        try:
            with pytest.raises(RegistryUnreachableError, match="refused"):
                registry.revision()
        finally:
            postgresql_server.start()
        assert registry.revision() == 0


def test_only_postgresql_is_for_several_nodes() -> None:
    assert not is_shared("sqlite:////home/tandem.db")
    assert is_shared("postgresql://user:password@host/tandem")
    assert is_shared("postgres://user:password@host/tandem")


def test_a_registry_by_its_address_is_opened_at_its_first_use() -> None:
    away = RegistryAddress(url="postgresql://user:secret@127.0.0.1:9/tandem?connect_timeout=2", identity="0" * 32)
    registry = Registry.at(away)
    with pytest.raises(RegistryUnreachableError) as caught:
        registry.revision()
    assert "secret" not in str(caught.value) and "secret" not in repr(away)


def test_names_are_listed_in_the_order_of_code_points_on_every_database(registry: Registry, model_folder) -> None:
    # English puts these otherwise, and pages of a list go on after a name.
    names = ["D-x", "Blue", "a-red", "c-green", "e_1", "ea"]
    for number, name in enumerate(names):
        registry.register_model(name, model_folder(name, bytes([number])))
    found, after = [], None
    while page := registry.list(after=after, limit=2):
        found += [record.name for record in page]
        after = page[-1].name
    assert found == sorted(names)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql//me:S3CRET@host/tandem",
        "postgresql://me:S3CRET@host:54x2/tandem",
        "postgresql://host:1/tandem?user=me&password=S3CRET&connect_timeout=2",
        "postgresql://me:S3@CRET@127.0.0.1:9/tandem?connect_timeout=2",
        "nosuchdb://me:S3CRET@host/tandem",
        "password=S3CRET host=h",
        "S3CRET",
    ],
)
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(RegistryError) as caught:
        upgrade(url)
    assert "S3" not in str(caught.value) and "CRET" not in str(caught.value)
