"""Models of the Hugging Face hub: the real client against a server that speaks the hub's API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from small_folders import small_adapter

from tandem import storage
from tandem.errors import ConfigError, HubError, HubUnreachableError, StorageError, UnknownModelError
from tandem.ids import folder_digest
from tandem.registry import HubModel, ModelRecord, Registry, find_base, find_model, pull_model, restore
from tandem.registry.hub.cache import RepoCache
from tandem.registry.hub.report import TerminalReport
from tandem.settings import child_environment

MIB = 2**20
CONFIG = b'{"max_position_embeddings": 64}'
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 4 * 4096,  # 4 MiB
    "README.md": b"# A model",
    "pytorch_model.bin": b"pickle",
}
NAME = "org/tiny-model"
READ = 10 * MIB
"""What the client reads at a time, and so loses at most."""
LARGE = 24 * MIB


@pytest.fixture
def registry(hub: FakeHub) -> Registry:
    return Registry.open()


def pull(name: str, registry: Registry) -> ModelRecord:
    ref = HubModel.parse(name)
    assert ref is not None
    return pull_model(ref, registry)


def pull_process(home: Path, hub: FakeHub, name: str = NAME) -> subprocess.Popen[str]:
    """`tandem models pull` in a process of its own."""
    environment = {"TANDEM_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": None, "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "tandem", "models", "pull", name],
        env=child_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_pulled_model_is_registered_with_its_commit_and_only_the_files_that_are_needed(
    hub: FakeHub, registry: Registry
) -> None:
    repo = hub.model(NAME, FILES)
    record = pull(NAME, registry)
    assert (record.id, record.kind, record.max_length) == (f"{NAME}@1", "model", 64)
    assert record.lineage == {"hub": NAME, "revision": "main", "commit": repo.refs["main"]}
    assert record.path.is_relative_to(os.environ["TANDEM_HOME"])
    assert sorted(p.name for p in record.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all((record.path / p.name).read_bytes() == FILES[p.name] for p in record.path.iterdir())
    assert record.digest == folder_digest(record.path)
    assert registry.resolve(NAME) == record


def test_a_second_use_downloads_nothing_and_a_commit_needs_no_network(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.model(NAME, FILES).refs["main"]
    record = pull(NAME, registry)
    hub.requests.clear()
    assert pull(NAME, registry) == record
    assert [(method, path) for method, path, _ in hub.requests] == [("GET", f"/api/models/{NAME}/revision/main")]
    hub.requests.clear()
    assert pull(f"{NAME}@{commit}", registry) == record
    assert find_model(f"{NAME}@1", registry) == record
    assert not hub.requests
    offline(monkeypatch)
    assert pull(NAME, registry) == pull(f"{NAME}@{commit}", registry) == record


def test_a_branch_that_moved_is_a_new_version_and_shared_files_are_not_downloaded_again(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.model(NAME, FILES)
    first = pull(NAME, registry)
    repo.commit({**FILES, "config.json": b'{"max_position_embeddings": 32}'})
    hub.requests.clear()
    second = pull(NAME, registry)
    assert (second.id, second.max_length) == (f"{NAME}@2", 32)
    assert [path.rpartition("/")[2] for path in hub.downloads()] == ["config.json"]
    assert registry.resolve(NAME) == second and registry.resolve(f"{NAME}@1") == first
    offline(monkeypatch)
    assert pull(NAME, registry) == second


def test_a_commit_that_changes_no_needed_file_is_no_new_version(hub: FakeHub, registry: Registry) -> None:
    repo = hub.model(NAME, FILES)
    first = pull(NAME, registry)
    repo.commit({**FILES, "README.md": b"# A better text"})
    hub.requests.clear()
    assert pull(NAME, registry) == first
    assert not hub.downloads()


def test_another_revision_is_registered_and_leaves_what_the_name_means(hub: FakeHub, registry: Registry) -> None:
    repo = hub.model(NAME, FILES)
    old = repo.commit({**FILES, "config.json": b'{"max_position_embeddings": 16}'}, "v1.0", "refs/pr/3")
    main = pull(NAME, registry)
    tagged = pull(f"{NAME}@v1.0", registry)
    assert (tagged.id, tagged.commit, tagged.lineage["revision"]) == (f"{NAME}@2", old, "v1.0")
    assert pull(f"{NAME}@refs/pr/3", registry) == tagged
    assert registry.resolve(NAME) == main
    assert pull(NAME, registry) == main


def test_a_revision_that_was_pulled_first_is_what_the_name_means_until_main_is(
    hub: FakeHub, registry: Registry
) -> None:
    repo = hub.model(NAME, FILES)
    repo.commit({**FILES, "config.json": b'{"max_position_embeddings": 16}'}, "v1.0")
    tagged = pull(f"{NAME}@v1.0", registry)
    assert registry.resolve(NAME) == tagged
    main = pull(NAME, registry)
    assert registry.resolve(NAME) == main != tagged


def test_a_connection_that_is_cut_midway_goes_on_where_it_was(hub: FakeHub, registry: Registry) -> None:
    weights = os.urandom(LARGE)
    hub.model(NAME, {**FILES, "model.safetensors": weights})
    hub.cut_after = 16 * MIB
    record = pull(NAME, registry)
    assert (record.path / "model.safetensors").read_bytes() == weights
    assert hub.ranges() == [f"bytes={READ}-"]


def test_a_process_that_was_killed_midway_leaves_what_came_and_the_next_goes_on_from_there(
    hub: FakeHub, tandem_home: Path
) -> None:
    weights = os.urandom(LARGE)
    hub.model(NAME, {**FILES, "model.safetensors": weights})
    hub.hold_after = 16 * MIB
    with pull_process(tandem_home, hub) as first:
        assert hub.held.wait(60)
        part = tandem_home / "cache" / "hub" / "models--org--tiny-model" / "blobs"
        deadline = time.monotonic() + 30
        while not any(p.stat().st_size >= READ for p in part.glob("*.incomplete")) and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    assert not list(part.parent.glob("snapshots/*"))
    hub.hold_after = None
    with pull_process(tandem_home, hub) as second:
        said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "10.0 MiB of it here already" in said, said
    assert hub.ranges() == [f"bytes={READ}-"]
    record = Registry.open().resolve(NAME)
    assert (record.path / "model.safetensors").read_bytes() == weights


def test_of_two_processes_at_once_one_downloads_and_the_other_waits(hub: FakeHub, tandem_home: Path) -> None:
    hub.model(NAME, FILES)
    hub.hold_after = MIB
    with pull_process(tandem_home, hub) as first, pull_process(tandem_home, hub) as second:
        assert hub.held.wait(60)
        # Both have asked for the commit; one of them has the lock.
        deadline = time.monotonic() + 60
        while sum(path.startswith("/api/") for _, path, _ in hub.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(5.0)
        hub.go_on.set()
        said = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert len(hub.downloads()) == len(set(hub.downloads())) == 3
    assert sum("waiting for it" in text for text in said) == 1
    assert [record.id for record in Registry.open().list(all_versions=True)] == [f"{NAME}@1"]


LOCK_AS_NOBODY = """
import os, sys
from tandem.registry.hub.cache import RepoCache
from tandem.registry.hub.report import TerminalReport
cache = RepoCache.of("org/tiny-model", "model")
# After the imports: the environment's Python may lie where this user cannot read.
gid = int(sys.argv[1])
os.setgroups([gid])
os.setgid(gid)
os.setuid(65534)
report = TerminalReport()
with cache.lock(report):
    cache.save_listing("dev", "c" * 40, ())
    (cache.folder / "blobs" / "x.incomplete").touch()
print("ok")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_second_member_of_the_group_can_use_the_cache_of_a_shared_home(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = 54321
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        Path(top).chmod(0o755)
        home = Path(top) / "home"
        home.mkdir()
        os.chown(home, -1, group)
        home.chmod(0o2770)
        monkeypatch.setenv("TANDEM_HOME", str(home))
        hub.model(NAME, FILES)
        pull(NAME, Registry.open())
        (lock,) = (home / "cache" / "hub" / ".locks").iterdir()
        lock.chmod(0o644)  # its mode in earlier versions
        second = subprocess.run(
            [sys.executable, "-c", LOCK_AS_NOBODY, str(group)],
            env=child_environment({"PYTHONDONTWRITEBYTECODE": "1"}),
            capture_output=True,
            text=True,
            check=False,
        )
    assert second.stdout.strip() == "ok", second.stderr


def test_a_cache_that_cannot_be_written_is_an_error_with_the_place(hub: FakeHub, tandem_home: Path) -> None:
    locks = tandem_home / "cache" / "hub" / ".locks"
    locks.parent.mkdir(parents=True)
    locks.touch()
    with pytest.raises(StorageError, match="locks"), RepoCache.of(NAME, "model").lock(TerminalReport()):
        pass


def test_a_file_with_another_digest_is_refused_and_not_kept(hub: FakeHub, registry: Registry) -> None:
    hub.model(NAME, FILES)
    hub.corrupt = True
    with pytest.raises(
        HubError, match=r"model\.safetensors came with another content than the hub says: its digest is"
    ):
        pull(NAME, registry)
    assert registry.list() == []
    hub.corrupt = False
    assert pull(NAME, registry).version == 1


def test_a_full_disk_is_found_before_the_download(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model(NAME, FILES)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 3 * MIB)
    with pytest.raises(StorageError, match=r"org/tiny-model needs about 4 MiB at .*, and 3 MiB are free"):
        pull(NAME, registry)
    assert not hub.downloads()


def test_a_gated_model_says_how_to_get_access_and_a_token_opens_it(
    hub: FakeHub, registry: Registry, tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model(NAME, FILES, gated=True)
    with pytest.raises(HubError, match=rf"is gated, and there is no token .*at {hub.url}/{NAME}, then set HF_TOKEN"):
        pull(NAME, registry)
    monkeypatch.setenv("HF_TOKEN", "hf_a_wrong_one")
    with pytest.raises(HubError, match=r"refuses the token \(401\)"):
        pull(NAME, registry)
    monkeypatch.delenv("HF_TOKEN")
    # Where `hf auth login` saves it.
    (tandem_home / "token").write_text(TOKEN)
    assert pull(NAME, registry).version == 1


def test_a_private_model_is_found_with_the_token_of_the_environment(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model(NAME, FILES, private=True)
    with pytest.raises(UnknownModelError, match="or only for those who may see it"):
        pull(NAME, registry)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull(NAME, registry).version == 1


def test_an_unknown_name_is_refused_with_the_nearest_local_one(hub: FakeHub, registry: Registry) -> None:
    hub.model(NAME, FILES)
    pull(NAME, registry)
    with pytest.raises(UnknownModelError, match=rf"has no model org/tiny-modle.*Did you mean '{NAME}'\?"):
        pull("org/tiny-modle", registry)
    with pytest.raises(
        UnknownModelError, match=r"model: There is no folder other/thing\. The hub .* has no model other/thing"
    ):
        find_model("other/thing", registry)
    with pytest.raises(UnknownModelError, match=r"`tandem models pull org/new` brings it from the Hugging Face hub"):
        registry.resolve("org/new")


def test_an_unknown_revision_is_refused_with_those_there_are(hub: FakeHub, registry: Registry) -> None:
    hub.model(NAME, FILES).commit(FILES, "v1.0")
    with pytest.raises(
        HubError, match=r"has no revision 'v1\.1'\. Did you mean 'v1\.0'\? It has main, v1\.0, and commits"
    ):
        pull(f"{NAME}@v1.1", registry)


def test_without_network_the_cache_is_used_or_the_next_step_said(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.model(NAME, FILES)
    record = pull(NAME, registry)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull(NAME, registry) == record
    said = capsys.readouterr().err
    assert "127.0.0.1:9 does not answer" in said and f"commit {str(record.commit)[:12]}, which it was at" in said
    with pytest.raises(
        HubUnreachableError, match=r"org/other is not on this machine, and http://127.* Check the network"
    ):
        pull("org/other", registry)
    with pytest.raises(HubUnreachableError, match="At other revisions it is here: "):
        pull(f"{NAME}@v2", registry)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.busy = True
    assert pull(NAME, registry) == record


def test_offline_nothing_is_asked_and_what_is_not_here_is_named(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model(NAME, FILES)
    offline(monkeypatch)
    with pytest.raises(
        HubUnreachableError, match=rf"{NAME} is not on this machine, and HF_HUB_OFFLINE is set\. Unset HF_HUB_OFFLINE"
    ):
        pull(NAME, registry)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"config.json": CONFIG, "pytorch_model.bin": b"x"},
            r"only weights in Python's pickle format \(pytorch_model\.bin\)",
        ),
        ({"config.json": CONFIG, "README.md": b"x"}, r"no \*\.safetensors at its top level"),
        ({"x.Q4.gguf": b"x"}, "name the repository that they were made from"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "is an adapter, not a model"),
    ],
)
def test_a_repository_without_safetensors_of_a_model_is_refused_before_a_download(
    hub: FakeHub, registry: Registry, files: dict[str, bytes], said: str
) -> None:
    hub.model(NAME, files)
    with pytest.raises(HubError, match=said):
        pull(NAME, registry)
    assert not hub.downloads()


def test_weights_in_two_layouts_are_downloaded_once(hub: FakeHub, registry: Registry) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 10 for i in (1, 2)}
    index = {"model.safetensors.index.json": b"{}"}
    hub.model(
        NAME, {"config.json": CONFIG, **shards, **index, "consolidated.safetensors": b"x", "original/x.json": b"{}"}
    )
    assert {p.name for p in pull(NAME, registry).path.iterdir()} == {"config.json", *shards, *index}


def test_a_training_base_and_an_adapter_of_it_resolve_to_the_model_of_the_hub(
    hub: FakeHub, registry: Registry, tmp_path: Path
) -> None:
    files = _files(small_model_files(tmp_path))
    hub.model(NAME, files)
    base = find_base(NAME)
    assert (base.id, base.record and base.record.commit) == (f"{NAME}@1", hub.models[NAME].refs["main"])
    adapter = registry.register_adapter("mine", small_adapter(tmp_path / "adapter"), base=NAME)
    assert adapter.base == f"{NAME}@1"


def test_a_folder_of_that_name_wins_and_hf_in_front_asks_the_hub(
    hub: FakeHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.model(NAME, FILES)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "tiny-model"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"model: no model at {folder}: it has no config.json"):
        find_model(NAME, registry)
    (folder / "config.json").write_bytes(CONFIG)
    assert find_model(NAME, registry) == folder
    assert not hub.requests
    found = find_model(f"hf://{NAME}", registry)
    assert isinstance(found, ModelRecord) and found.id == f"{NAME}@1"


def test_files_that_were_removed_come_again_also_on_a_node_with_a_home_of_its_own(
    hub: FakeHub, registry: Registry, tandem_home: Path
) -> None:
    hub.model(NAME, FILES)
    record = pull(NAME, registry)
    (tandem_home / "cache").rename(tandem_home / "gone")
    assert restore(record.path) == record.path
    assert record.digest == folder_digest(record.path)
    (tandem_home / "cache").rename(tandem_home / "gone too")
    assert find_model(f"{NAME}@1", registry) == record
    assert record.path.is_dir()
    assert restore(tandem_home / "models" / "another") == tandem_home / "models" / "another"


def test_what_was_learned_of_a_repository_is_learned_again_where_it_is_damaged(
    hub: FakeHub, registry: Registry
) -> None:
    hub.model(NAME, FILES)
    record = pull(NAME, registry)
    cache = RepoCache.of(NAME, "model")
    (cache.folder / "tandem.json").write_text('{"revisions": ')
    assert restore(record.path) == record.path
    hub.requests.clear()
    assert pull(NAME, registry) == record
    assert not hub.downloads()
    assert json.loads((cache.folder / "tandem.json").read_text())["revisions"] == {"main": record.commit}


def test_a_file_too_large_for_plain_http_is_left_to_the_clients_own_download(
    hub: FakeHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.model(NAME, FILES)
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", MIB)
    # This server has no Xet, which the hub has for such files; the client says so.
    with pytest.raises(HubError, match="too large to be downloaded using the regular download method"):
        pull(NAME, registry)
    assert not list(RepoCache.of(NAME, "model").folder.rglob("*.xet"))


@pytest.mark.parametrize("path", ["1_Pooling/../../../outside.json", "/outside.json"])
def test_a_server_that_lists_paths_outside_is_refused(hub: FakeHub, registry: Registry, path: str) -> None:
    hub.model(NAME, {**FILES, "modules.json": b"[]", path: b"{}"})
    with pytest.raises(HubError, match="lists what no hub lists: .*outside.json"):
        pull(NAME, registry)
    assert not hub.downloads()


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "main"),
        ("Qwen/Qwen3-0.6B@v1.0", "Qwen/Qwen3-0.6B", "v1.0"),
        ("Qwen/Qwen3-0.6B@refs/pr/1", "Qwen/Qwen3-0.6B", "refs/pr/1"),
        ("hf://a/b_c@0123", "a/b_c", None),
        ("a/b@3", None, None),
        ("a/b/c", None, None),
        ("/a/b", None, None),
        ("./a/b", None, None),
        ("a", None, None),
        ("a/b@", None, None),
        ("a/b@../x", None, None),
        ("a/..", None, None),
        ("a--b/c", None, None),
        (f"a/{'b' * 95}", None, None),
    ],
)
def test_names_of_the_hub_are_told_from_paths_and_versions(text: str, repo: str | None, revision: str | None) -> None:
    ref = HubModel.parse(text)
    assert (ref and ref.repo, ref and ref.revision) == ((repo, revision) if revision else (None, None))


def small_model_files(tmp_path: Path) -> Path:
    from small_folders import small_model

    return small_model(tmp_path / "hub-model")


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "word", ["org/name@", "a/b/c", "hf://a/b/c", "hf://org/name@", "hf://datasets/a/b", "org/name@x y"]
)
def test_a_name_that_is_almost_one_of_the_hub_is_told_the_form(registry: Registry, word: str) -> None:
    with pytest.raises(ConfigError, match=r"org/name, or org/name@ and a branch, a tag or a commit"):
        find_model(word, registry)


def test_a_path_is_told_nothing_of_the_hub(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json\.$"):
        find_model(str(tmp_path / "nothing"), registry)
