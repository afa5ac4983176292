"""Checks before a machine becomes a node of a Ray cluster: what Ray would find out after minutes, or not at all."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from tandem import settings as environment
from tandem.cluster.health.cordons import read_cordons
from tandem.errors import ClusterError, ConfigError


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`; empty where there is none after the name, None without the name."""
    for index, argument in enumerate(arguments):
        if argument == name:
            return arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def check_address(address: str) -> None:
    """Refuse an invalid address, or a host name that this machine cannot resolve: Ray would try it for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--address is {address!r}; it must be HOST:PORT of the head, such as 10.0.0.1:6379.")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (socket.gaierror, OverflowError) as error:
        raise ClusterError(
            f"--address is {address!r}, and {host} cannot be resolved on this machine ({error})."
        ) from error


def check_filled_in() -> None:
    """Refuse an environment that still has the placeholders of deploy/tandem.env.example."""
    for name, value in (
        ("TANDEM_HOME", environment.settings().home),
        ("TANDEM_DATABASE_URL", environment.settings().database_url),
    ):
        if "<" in str(value or ""):
            raise ConfigError(
                f"{name} still has a placeholder (<...>). Fill in deploy/tandem.env, and start the node again."
            )


def check_ports(ports: Iterable[int]) -> None:
    """Refuse a machine where another user's node has the ports that HAProxy is to have."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ClusterError(
                    f"Port {port} of this machine is taken, perhaps by a node of another user; a machine has room for one node. "
                    "`ss -ltnp` shows who has it."
                ) from error


def check_restart(arguments: Sequence[str]) -> None:
    """ClusterError where a node is not to be started again yet: it is cordoned, or its head cannot be reached.

    A node that was drained ends by itself too; its cordon keeps it away. `ray start` would take minutes to miss a head.
    """
    names = {socket.gethostname(), option(arguments, "--node-ip-address")}
    if (address := option(arguments, "--address")) is not None:
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0) as connection:
                # The address that the head sees is the node's, unless it was told another one.
                names.add(connection.getsockname()[0])
        except OSError as error:
            raise ClusterError(f"{address} cannot be reached ({error}).") from error
    if any(cordon.node in names for cordon in read_cordons()):
        raise ClusterError("it is cordoned; `tandem cluster uncordon` lets it join again.")


def check_durable() -> None:
    """Refuse to restart a head whose cluster state goes with it: its nodes, jobs and apps would be lost all the same."""
    if environment.variable("RAY_REDIS_ADDRESS") or environment.variable("RAY_gcs_storage") == "rocksdb":
        return
    raise ConfigError(
        "--restart on a head needs a cluster state that outlives it. Set RAY_gcs_storage=rocksdb and RAY_gcs_storage_path to a "
        "folder, or RAY_REDIS_ADDRESS to a Redis server."
    )


def require_token() -> None:
    """Refuse to join a cluster without its token: Ray would make another one here, and the head would refuse the node."""
    mode = environment.variable("RAY_AUTH_MODE")
    if (mode and mode != "token") or environment.variable("RAY_AUTH_TOKEN"):
        return
    path = Path(environment.variable("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        raise ClusterError(
            f"{path} is not here. Copy the head's token to it (in cluster.yaml by file_mounts), with mode 0600."
        )
