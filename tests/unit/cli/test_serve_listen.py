"""Where an app listens: the command line, the config and the settings, and what cannot change while Serve is up."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from certificates import make_pair

from tandem.auth import KeyStore
from tandem.cli.serve import read_config, tls_files
from tandem.cluster.haproxy import has_tls, serving_environment, write_script
from tandem.cluster.local import LocalCluster
from tandem.cluster.ports import free_ports
from tandem.config import GatewayConfig, ListenConfig, OidcConfig, ServeConfig, TlsConfig
from tandem.errors import ClusterError, ConfigError
from tandem.sdk.listener_tls import apply_tls, node_problem, running_tls, warn_of_clear_keys
from tandem.sdk.serving import check_listener, check_port, listener, url_of


def test_the_command_line_counts_before_the_config_and_the_config_before_the_settings(
    tandem_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeyStore.open().create("first", by="ann")
    first, second, third = free_ports(3)
    monkeypatch.setenv("TANDEM_PORT", str(third))
    assert listener(ServeConfig()) == ListenConfig(port=third)
    config = ServeConfig(listen=ListenConfig(host="0.0.0.0", port=second, nodes="head"))
    assert listener(config) == config.listen
    assert listener(config, "127.0.0.1", first) == ListenConfig(host="127.0.0.1", port=first, nodes="head")


def test_an_app_that_other_machines_reach_needs_a_key(tandem_home: Path) -> None:
    (port,) = free_ports(1)
    config = ServeConfig(listen=ListenConfig(host="0.0.0.0", port=port))
    with pytest.raises(ClusterError, match=r"listen on 0\.0\.0\.0.*`tandem keys create NAME`"):
        listener(config)
    key = KeyStore.open().create("first", by="ann").key
    assert listener(config).host == "0.0.0.0"
    KeyStore.open().revoke(key.id, by="ann")
    with pytest.raises(ClusterError, match="there is no API key yet"):
        listener(config)
    assert listener(config, "127.0.0.1").host == "127.0.0.1"


def test_an_app_with_a_provider_of_tokens_needs_no_key(tandem_home: Path) -> None:
    (port,) = free_ports(1)
    oidc = OidcConfig(issuer="https://login.example.com", audience="tandem")
    config = ServeConfig(listen=ListenConfig(host="0.0.0.0", port=port), gateway=GatewayConfig(oidc=oidc))
    assert listener(config).host == "0.0.0.0"


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ClusterError, match=f"Port {port} is taken by"):
            listener(ServeConfig(listen=ListenConfig(port=port)))


def test_an_address_that_cannot_be_listened_on_is_refused_in_words() -> None:
    with pytest.raises(ClusterError, match=r"192\.0\.2\.7 is no address of this machine"):
        check_port(8000, "192.0.2.7")
    with pytest.raises(ClusterError, match="not a host is no address to listen on"):
        check_port(8000, "not a host")


def test_addresses_of_the_sixth_version_and_of_all_interfaces_work() -> None:
    (port,) = free_ports(1)
    for host in ("::1", "::", "0.0.0.0"):
        check_port(port, host)
    assert url_of("::1", 8000) == "http://[::1]:8000/v1"
    assert url_of("::", 8000) == url_of("0.0.0.0", 8000) == "http://127.0.0.1:8000/v1"
    assert url_of("10.0.0.5", 8000) == "http://10.0.0.5:8000/v1"


def test_another_listener_than_the_running_one_is_refused_when_it_is_asked_for() -> None:
    running = {"http_options": {"host": "127.0.0.1", "port": 8123}}
    check_listener(running, ListenConfig())
    check_listener(running, ListenConfig(port=8123))
    check_listener({}, ListenConfig(host="0.0.0.0"))
    with pytest.raises(
        ClusterError, match=r"listen.host is '0.0.0.0', and Serve listens on 127.0.0.1:8123 until it ends"
    ):
        check_listener(running, ListenConfig(host="0.0.0.0"))
    with pytest.raises(ClusterError, match="listen.port is 9000"):
        check_listener(running, ListenConfig(port=9000))


def test_impossible_listeners_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"listen.nodes is 'evry'.*every"):
        ListenConfig(nodes="evry")
    with pytest.raises(ConfigError, match=r"listen.port is 0; it must be between 1 and 65535"):
        ListenConfig(port=0)


def test_an_empty_list_of_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models is empty"):
        read_config(None, None, ["models=[]"])
    (tmp_path / "app.yaml").write_text("models: []\n")
    with pytest.raises(ConfigError, match="models is empty"):
        read_config(None, tmp_path / "app.yaml", [])


def test_an_unknown_engine_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(ConfigError, match=r"models\[0\]\.engine is 'vlm'.*Did you mean 'vllm'"):
        read_config(None, None, ["models=[{model: a, engine: vlm}]"])


def test_files_for_tls_are_checked_before_anything_starts_and_kept_by_absolute_paths(
    tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, other = make_pair(tmp_path, "first"), make_pair(tmp_path, "second")
    (port,) = free_ports(1)
    monkeypatch.chdir(tmp_path)
    relative = TlsConfig(certificate="first.crt", key="first.key")
    config = ServeConfig(listen=ListenConfig(port=port, tls=relative))
    assert listener(config).tls == pair
    assert listener(config, tls=other).tls == other
    with pytest.raises(ConfigError, match="is not that of the first certificate"):
        listener(config, tls=TlsConfig(certificate=pair.certificate, key=other.key))
    assert listener(ServeConfig(listen=ListenConfig(port=port))).tls is None
    monkeypatch.setenv("TANDEM_TLS_CERTIFICATE", pair.certificate)
    with pytest.raises(ConfigError, match="belong together"):
        listener(ServeConfig(listen=ListenConfig(port=port)))
    monkeypatch.setenv("TANDEM_TLS_KEY", pair.key)
    assert listener(ServeConfig(listen=ListenConfig(port=port))).tls == pair


def test_the_command_line_names_both_files_or_none() -> None:
    assert tls_files(None, None) is None
    assert tls_files(Path("/a"), Path("/b")) == TlsConfig(certificate="/a", key="/b")
    for certificate, key in ((Path("/a"), None), (None, Path("/b"))):
        with pytest.raises(ConfigError, match="belong together"):
            tls_files(certificate, key)


def test_the_url_of_a_listener_with_tls_has_a_name_that_its_certificate_is_for(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "first")
    assert url_of("127.0.0.1", 8000, pair) == "https://127.0.0.1:8000/v1"
    assert url_of("0.0.0.0", 8000, pair) == "https://127.0.0.1:8000/v1"
    assert url_of("10.0.0.5", 8000, pair) == "https://localhost:8000/v1"


def local_cluster_in(folder: Path) -> LocalCluster:
    return LocalCluster(dashboard_url="", mark="", folder=folder, pid=0)


def test_a_local_clusters_listener_gets_the_files_unless_other_apps_use_it(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "first")
    write_script(tmp_path)
    cluster = local_cluster_in(tmp_path)
    apply_tls(cluster, pair, serving=False)
    assert running_tls(cluster) == pair
    apply_tls(cluster, pair, serving=True)
    with pytest.raises(ClusterError, match=r"has TLS with .*first\.crt until its other apps end.*asks for no TLS"):
        apply_tls(cluster, None, serving=True)
    check_listener({}, ListenConfig(tls=pair), cluster)
    with pytest.raises(ClusterError, match=r"listen\.tls is not what Serve listens with"):
        check_listener({}, ListenConfig(tls=make_pair(tmp_path, "second")), cluster)
    apply_tls(cluster, None, serving=False)
    assert running_tls(cluster) is None


def test_a_node_tells_what_its_listener_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "first")
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    assert "was not started by `tandem node start`" in (node_problem(pair) or "")
    monkeypatch.setenv("TANDEM_TLS_CERTIFICATE", pair.certificate)
    monkeypatch.setenv("TANDEM_TLS_KEY", pair.key)
    for number, expected in ((1, None), (2, "no TLS")):
        folder = tmp_path / str(number)
        folder.mkdir()
        variables = serving_environment(folder, [1, 2, 3, 4], range(5, 6))
        monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
        assert node_problem(pair) == (None if expected is None else "has no TLS")
        assert has_tls() == (expected is None)
        monkeypatch.delenv("TANDEM_TLS_CERTIFICATE", raising=False)
        monkeypatch.delenv("TANDEM_TLS_KEY", raising=False)


def test_a_node_does_not_start_with_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "first", days=-1)
    monkeypatch.setenv("TANDEM_TLS_CERTIFICATE", pair.certificate)
    monkeypatch.setenv("TANDEM_TLS_KEY", pair.key)
    with pytest.raises(ConfigError, match="expired"):
        serving_environment(tmp_path, [1, 2, 3, 4], range(5, 6))


def test_keys_in_clear_are_told_with_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_clear_keys("127.0.0.1", None)
    warn_of_clear_keys("0.0.0.0", make_pair(tmp_path, "first"))
    assert capsys.readouterr().err == ""
    warn_of_clear_keys("0.0.0.0", None)
    told = capsys.readouterr().err
    assert "0.0.0.0" in told and "in clear" in told and "listen.tls" in told
