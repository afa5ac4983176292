"""TLS between the processes of one app: a certificate authority in its directory, and a certificate for each process.

A process makes a key pair, and has its certificate signed by the directory through Ray (`Directory.enroll`): private keys do not
leave their processes. The authority's key is kept with the cluster (`cluster_store`), so that a restarted directory signs for
the same app. Both ends of a connection show a certificate (docs/adr/0038).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import os
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

APP_NAME = "app.tandem.internal"
"""The name that every certificate is for. Addresses of replicas change; what counts is that a peer belongs to the app."""
VALID = dt.timedelta(days=3650)
CLOCK_TOLERANCE = dt.timedelta(hours=1)
"""Certificates are valid from before they were made: the clocks of nodes differ."""
ENROLL_S = 10.0
"""Seconds that the directory may take to sign a certificate, before it is asked again."""
STARTING_PATIENCE_S = 60.0
"""Seconds for which a new replica asks for its certificate: a directory whose node was lost is somewhere else by then."""
HANDSHAKE_S = 5.0
"""Seconds that a client may take for its handshake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrollment:
    """The directory's answer to a process that joins the app."""

    certificate: bytes
    """Of the process, in PEM."""
    authority: bytes
    """The app's authority, in PEM."""
    required: bool
    """Whether servers of the app speak TLS; false where its nodes talk over loopback, or the config turns it off."""


Enroll = Callable[[bytes], Awaitable[Enrollment]]
"""Sends the directory a certificate signing request in PEM."""
ClientTls = Callable[[], Awaitable[ssl.SSLContext]]
"""Returns the TLS context of a process's connections to others of its app."""


class Authority:
    """The certificate authority of one app."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls) -> Authority:
        """A new authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tandem app authority")])
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            _builder(name, name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    @classmethod
    def from_pem(cls, content: bytes) -> Authority:
        """The authority that `to_pem` has written."""
        key = cast(ec.EllipticCurvePrivateKey, serialization.load_pem_private_key(content, password=None))
        return cls(key, x509.load_pem_x509_certificate(content))

    def to_pem(self) -> bytes:
        """Key and certificate."""
        return _key_pem(self._key) + self.certificate

    @property
    def certificate(self) -> bytes:
        """The certificate in PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def sign(self, request: bytes) -> bytes:
        """The certificate for a signing request; of the request only the key is used. ValueError if it cannot be read."""
        parsed = x509.load_pem_x509_csr(request)
        if not parsed.is_signature_valid:
            raise ValueError("The request for a certificate is not signed by the key that it names.")
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, APP_NAME)])
        public_key = cast(ec.EllipticCurvePublicKey, parsed.public_key())
        certificate = (
            _builder(name, self._certificate.subject, public_key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(APP_NAME)]), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Key and certificate of one process of an app."""

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes

    @classmethod
    def signed_by(cls, authority: Authority) -> Identity:
        """An identity for the process that has the authority itself."""
        key, request = new_request()
        return cls(key=key, certificate=authority.sign(request), authority=authority.certificate)

    def server(self) -> ssl.SSLContext:
        """The context of a server that takes connections of the app's processes only."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        # Sessions are not resumed: connections live for long.
        context.num_tickets = 0
        return self._loaded(context)

    def client(self) -> ssl.SSLContext:
        """The context of connections to servers of the app, made with `server_hostname=APP_NAME`."""
        return self._loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.authority.decode())
        # Python reads a certificate and its key from a path only: of a file in memory.
        descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(self.key + self.certificate)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context


class Membership:
    """Membership of this process in its app: asks the directory for a certificate once, when it is first needed."""

    def __init__(self, enroll: Enroll, patience_s: float = 0.0) -> None:
        """`patience_s`: seconds for which a directory that does not answer is asked again."""
        self._enroll = enroll
        self._patience_s = patience_s
        self._lock = asyncio.Lock()
        self._enrolled: tuple[Identity, bool] | None = None
        self._client: ssl.SSLContext | None = None

    async def server(self) -> ssl.SSLContext | None:
        """The context for a server of this process; None: the app's servers speak no TLS. Raises what Ray raises."""
        identity, required = await self._join()
        return identity.server() if required else None

    async def client(self) -> ssl.SSLContext:
        """The context of this process's connections (`ClientTls`). Raises what Ray raises; the next call asks again."""
        if self._client is None:
            identity, _ = await self._join()
            self._client = identity.client()
        return self._client

    async def _ask(self, request: bytes) -> Enrollment:
        """The directory's answer; asked again for a while where it is being replaced, as when its node was lost."""
        deadline = time.monotonic() + self._patience_s
        pauses = itertools.chain((0.2, 0.5, 1.0), itertools.repeat(2.0))
        while True:
            try:
                async with asyncio.timeout(ENROLL_S):
                    return await self._enroll(request)
            except Exception:  # whatever Ray raises where no directory is there
                pause = next(pauses)
                if time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)

    async def _join(self) -> tuple[Identity, bool]:
        async with self._lock:
            if self._enrolled is None:
                key, request = new_request()
                answer = await self._ask(request)
                identity = Identity(key=key, certificate=answer.certificate, authority=answer.authority)
                self._enrolled = identity, answer.required
        return self._enrolled


def new_request() -> tuple[bytes, bytes]:
    """A new private key and the request to sign a certificate for it, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, APP_NAME)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return _key_pem(key), request.public_bytes(serialization.Encoding.PEM)


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + VALID)
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
