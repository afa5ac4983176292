"""Config of a connection by SSH."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SshConfig:
    """A host, and the way to it; what is not set, ssh takes from ~/.ssh/config."""

    host: str
    """A name of ~/.ssh/config, or HOST, or USER@HOST."""
    port: int | None = None
    jump: tuple[str, ...] = ()
    """Hosts to pass through on the way, in order."""
    key: str | None = None
    """File of the private key."""
    config: str | None = None
    """A file to read instead of ~/.ssh/config."""
    check_host: bool = True
    """Whether the host's key is compared with that of ~/.ssh/known_hosts. Ray's launcher does not: a cloud gives its addresses to
    other machines all the time."""

    def __post_init__(self) -> None:
        for value in (self.host, *self.jump):
            if not value or value.startswith("-") or not value.isprintable() or " " in value:
                raise ConfigError(f"{value!r} is no host for ssh; write HOST or USER@HOST.")
        if self.port is not None:
            check.between("port", self.port, 1, 65535)

    def options(self) -> list[str]:
        """The options for ssh."""
        found = []
        if self.config is not None:
            found += ["-F", self.config]
        if self.port is not None:
            found += ["-p", str(self.port)]
        if self.key is not None:
            found += ["-i", self.key]
        if self.jump:
            found += ["-J", ",".join(self.jump)]
        if not self.check_host:
            found += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        return found
