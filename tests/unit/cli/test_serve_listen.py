"""Where an app listens: the command line, the config and the settings, and what cannot change while Serve is up."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tandem.auth import KeyStore
from tandem.cli.serve import read_config
from tandem.cluster.ports import free_ports
from tandem.config import GatewayConfig, ListenConfig, OidcConfig, ServeConfig
from tandem.errors import ClusterError, ConfigError
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
