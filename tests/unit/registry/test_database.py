"""Opening: migrations, several processes at once, databases that refuse."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from postgresql import Server
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

import tandem.db
from tandem.db.database import connect, database_errors, open_database
from tandem.db.schema import REVISION, Base
from tandem.errors import RegistryError, StorageError
from tandem.registry import Registry, upgrade

REGISTER = """
import json, sys
from tandem.registry import Registry
url, name, folder, base = sys.argv[1:5]
registry = Registry(url)
if base:
    record = registry.register_adapter(name, folder, base=base)
else:
    record = registry.register_model(name, folder)
print(json.dumps([record.id, record.digest, registry.revision()]))
"""


def register_at_once(url: str, jobs: list[tuple[str, Path]], base: str = "") -> list[list[str]]:
    """Each (name, folder) registered by a process of its own, all started together."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER, url, name, str(folder), base],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, folder in jobs
    ]
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    return results


def test_processes_that_open_a_fresh_database_at_once_get_versions_of_their_own(tmp_path, model_folder):
    url = f"sqlite:///{tmp_path}/fresh/tandem.db"
    results = register_at_once(url, [("base", model_folder(f"m{i}", bytes([i]))) for i in range(4)])
    assert sorted(r[0] for r in results) == [f"base@{i}" for i in range(1, 5)]
    assert len({r.digest for r in Registry(url).list(all_versions=True)}) == 4


def test_processes_that_register_the_same_content_get_the_same_record(tmp_path, model_folder):
    url = f"sqlite:///{tmp_path}/fresh/tandem.db"
    folder = model_folder()
    results = register_at_once(url, [("base", folder)] * 3)
    assert {r[0] for r in results} == {"base@1"}
    assert Registry(url).revision() == 1


def test_processes_that_register_in_postgresql_at_once_get_versions_of_their_own(
    postgresql_server: Server, model_folder
) -> None:
    url = postgresql_server.create("writers")
    upgrade(url)
    found = register_at_once(url, [("base", model_folder(f"m{i}", bytes([i]))) for i in range(4)])
    assert sorted(each[0] for each in found) == [f"base@{i}" for i in range(1, 5)]


def test_the_files_of_a_database_are_for_their_owner_alone_in_whatever_folder(tmp_path):
    tmp_path.chmod(0o755)
    engine = open_database(f"sqlite:///{tmp_path}/tandem.db")
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1 FROM alembic_version")
        files = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.glob("tandem.db*")}
    engine.dispose()
    assert "tandem.db" in files and set(files.values()) == {0o600}, files


def test_opening_a_database_again_keeps_the_locks_of_this_process(tmp_path):
    url = f"sqlite:///{tmp_path}/tandem.db"
    first = open_database(url)
    with first.connect() as reader:
        reader.exec_driver_sql("SELECT version_num FROM alembic_version").all()
        open_database(url).dispose()
        # Whoever closes the last connection removes the log of changes, which this process still writes to.
        other = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM alembic_version'); c.close()"
        subprocess.run([sys.executable, "-c", other, str(tmp_path / "tandem.db")], check=True)
        assert (tmp_path / "tandem.db-wal").exists()
    first.dispose()


def test_an_empty_database_is_brought_to_the_newest_schema(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path}/tandem.db")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == REVISION
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() >= 10_000


def test_the_migrations_make_exactly_the_tables_that_the_code_uses(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path}/tandem.db")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_every_migration_can_be_taken_back(tmp_path):
    import alembic.command

    url = f"sqlite:///{tmp_path}/tandem.db"
    Registry(url).close()
    config = Config()
    config.set_main_option("script_location", str(Path(tandem.db.__file__).parent / "migrations"))
    with connect(url).connect() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "base")
        tables = set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars())
    assert tables == {"alembic_version"}
    assert Registry(url).list() == []


def test_the_newest_migration_is_the_one_that_the_code_names():
    config = Config()
    config.set_main_option("script_location", str(Path(tandem.db.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == REVISION


def test_a_migration_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    import alembic.command

    real = alembic.command.upgrade

    def break_off(config, revision):
        real(config, revision)
        raise OSError("killed here")

    url = f"sqlite:///{tmp_path}/tandem.db"
    monkeypatch.setattr(alembic.command, "upgrade", break_off)
    with pytest.raises(OSError, match="killed here"):
        Registry(url)
    with connect(url).connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one() == 0
    monkeypatch.undo()
    assert Registry(url).list() == []


def test_opening_again_needs_no_migration_and_keeps_what_is_there(registry, model_folder, monkeypatch):
    record = registry.register_model("base", model_folder())
    monkeypatch.setattr("tandem.db.database._upgrade", lambda connection: pytest.fail("migrated again"))
    assert Registry(registry.url).resolve("base") == record


def test_a_database_of_a_newer_tandem_is_refused(registry):
    with connect(registry.url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(RegistryError, match="schema 9999 and this Tandem knows up to"):
        Registry(registry.url)


def test_a_database_in_memory_works(model_folder):
    registry = Registry("sqlite://")
    assert registry.register_model("base", model_folder()).id == "base@1"
    assert registry.resolve("base").id == "base@1"


@pytest.mark.parametrize("url", ["not a url", "nosuchdb://x/y", "", "sqlite:////proc/nowhere/tandem.db"])
def test_a_url_that_cannot_be_opened_is_a_clear_error(url):
    with pytest.raises((RegistryError, StorageError)):
        Registry(url)


def test_a_file_that_is_no_database_is_a_clear_error(tmp_path):
    (tmp_path / "tandem.db").write_text("this is a text file, and a long enough one to be read as a header\n" * 20)
    with pytest.raises(RegistryError, match=r"tandem\.db refused: file is not a database.*TANDEM_HOME"):
        Registry(f"sqlite:///{tmp_path}/tandem.db")


def test_a_reader_is_not_held_up_by_a_writer(sqlite_registry, model_folder, tmp_path):
    registry = sqlite_registry
    record = registry.register_model("base", model_folder())
    writer = sqlite3.connect(tmp_path / "home" / "tandem.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE registry_clock SET revision = 99")
    assert registry.resolve("base") == record
    assert registry.revision() == 1
    writer.execute("ROLLBACK")
    writer.close()


def test_a_password_is_not_shown():
    url = make_url("postgresql://me:hunter2@db.example/tandem")
    with pytest.raises(RegistryError, match="no route to host") as caught, database_errors(url):
        raise OperationalError("SELECT 1", {}, Exception("no route to host"))
    assert "db.example" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_the_registry_imports_neither_torch_nor_transformers():
    code = (
        "import sys, tandem.registry; print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_in_a_registry_of_the_first_schema_names_mean_what_they_meant_and_can_be_rolled_back(tmp_path):
    import alembic.command

    url = f"sqlite:///{tmp_path}/tandem.db"
    config = Config()
    config.set_main_option("script_location", str(Path(tandem.db.__file__).parent / "migrations"))
    with connect(url).begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        for name, kind, last in (("base", "model", 1), ("red", "adapter", 3), ("gone", "adapter", 2)):
            connection.exec_driver_sql("INSERT INTO registry_names VALUES (?, ?, ?)", (name, kind, last))
        rows = [("base", 1, "model", None), ("red", 1, "adapter", "base@1"), ("red", 3, "adapter", "base@1")]
        for revision, (name, version, kind, base) in enumerate(rows, 1):
            values = (
                f"{name}@{version}",
                name,
                version,
                kind,
                "/x",
                "d",
                base,
                8,
                None,
                "{}",
                "2026-01-02 03:04:05",
                revision,
            )
            connection.exec_driver_sql(f"INSERT INTO registry_models VALUES ({', '.join('?' * 12)})", values)
        connection.exec_driver_sql("UPDATE registry_clock SET revision = 3")
    registry = Registry(url)
    assert [record.id for record in registry.list()] == ["base@1", "red@3"]
    assert registry.resolve("red").id == "red@3" and registry.revision() == 3
    assert [(p.id, p.at.year) for p in registry.promotions("red")] == [("red@3", 2026), ("red@1", 2026)]
    assert registry.roll_back("red").id == "red@1"
    assert registry.promotions("gone") == [] and registry.pins() == []


@pytest.mark.parametrize(
    "url", ["mysql://me:secret@host/db", "mysql+pymysql://me:secret@host/db", "oracle://me:secret@host/db"]
)
def test_a_database_that_holds_no_registry_is_refused_with_those_that_do(url: str) -> None:
    with pytest.raises(RegistryError, match=r"SQLite or PostgreSQL.*Set it to postgresql://") as refused:
        connect(url)
    assert "secret" not in str(refused.value)


def test_a_missing_driver_is_told_with_how_to_install_it() -> None:
    with pytest.raises(RegistryError, match=r"psycopg2.* is not installed\. `pip install psycopg2` brings it"):
        connect("postgresql+psycopg2://me@host/db")


def test_a_reason_that_is_a_question_gets_no_second_mark() -> None:
    with (
        pytest.raises(RegistryError, match=r"TCP/IP connections\? Check that it can be reached"),
        database_errors(make_url("postgresql://host/db")),
    ):
        raise OperationalError("SELECT 1", {}, Exception("Is the server accepting TCP/IP connections?"))
