"""Config of TLS at the public listener."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """TLS 1.2 and 1.3, with HTTP/2 and HTTP/1.1, by HAProxy. Renewed files are taken up within seconds; streams go on."""

    certificate: str
    """File with the certificate, and after it those of its issuers (PEM); at this path on each node that has the listener."""
    key: str
    """File with the certificate's private key (PEM, without a passphrase), which other users cannot read."""

    def __post_init__(self) -> None:
        for name in ("certificate", "key"):
            if not getattr(self, name) or not getattr(self, name).isprintable():
                raise ConfigError(f"listen.tls.{name} must be the path of a file, of printable characters.")
