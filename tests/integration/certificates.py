"""Certificates that sign themselves, and their keys, as files."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tandem.config import TlsConfig

NOW = dt.datetime.now(dt.UTC)
DAY = dt.timedelta(days=1)


def make_pair(
    folder: Path, name: str, *, days: int = 30, begins: dt.datetime | None = None, passphrase: bytes | None = None
) -> TlsConfig:
    """A certificate that signs itself, for localhost and 127.0.0.1, with `name` as its subject."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    begin = begins or NOW - 60 * DAY
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    built = built.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(NOW + days * DAY)
    certificate = built.add_extension(names, critical=False).sign(key, hashes.SHA256())
    pair = TlsConfig(certificate=str(folder / f"{name}.crt"), key=str(folder / f"{name}.key"))
    Path(pair.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM).rstrip())
    encryption: Any = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    Path(pair.key).write_bytes(pem)
    Path(pair.key).chmod(0o600)
    return pair
