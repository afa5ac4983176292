"""TLS at a node's public listener: checks of the files, and the part of HAProxy's script that uses them.

The files are named in a folder of the node. Whenever HAProxy starts, and every `POLL_S` while it runs, the script puts
certificate and key together in a copy for HAProxy, if HAProxy itself finds that they fit; a pair that does not fit (half a
renewal) changes nothing. A Lua task inside HAProxy takes the copy up when it has changed, so that no stream is dropped.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tandem.config.serving.tls import TlsConfig
from tandem.errors import ConfigError
from tandem.settings import settings
from tandem.storage import write_atomic

POLL_S = 2
FOLDER, FILES, COPY = "tls", "files", "listener.pem"
EDITS = r"""
/^frontend http_frontend/,/^ *bind/ s#^ *bind .*#& ssl crt {copy} alpn h2,http/1.1 ssl-min-ver TLSv1.2#
/^global/ a\
    lua-load {lua}
"""
CHECK = """\
defaults
    mode http
    timeout client 1s
    timeout connect 1s
    timeout server 1s
frontend check
    bind 127.0.0.1:1 ssl crt CANDIDATE
"""
LUA = """\
local function read()
  local file = io.open("{copy}", "rb")
  if not file then return nil end
  local text = file:read("a")
  file:close()
  return text
end
local known = read()
core.register_task(function()
  while true do
    core.sleep({poll_s})
    local now = read()
    if now and now ~= known then
      known = now
      -- The empty name is that of a file with certificates and key in one.
      local done, problem = pcall(CertCache.set, {{filename = "{copy}", [""] = now}})
      if done then
        core.Info("The renewed TLS certificate is in use.")
      else
        core.Warning("The renewed TLS certificate is not in use until HAProxy is loaded again: " .. tostring(problem))
      end
    end
  end
end)
"""
SCRIPT = """\
tls="{tls}"
new="$tls/candidate-$$.pem"
take_up() {{
  {{ IFS= read -r certificate; IFS= read -r key; }} < "$tls/{files}" || return 1
  if ! ( umask 077; {{ cat "$certificate" && echo && cat "$key"; }} > "$new" ) 2>/dev/null; then rm -f "$new"; return 1; fi
  if ! cmp -s "$new" "$tls/{copy}" && [ "$(cksum < "$new")" != "$refused" ]; then
    sed "s#CANDIDATE#$new#" "$tls/check.cfg" > "$new.cfg"
    if "{binary}" -c -f "$new.cfg" >/dev/null 2>&1; then mv -f "$new" "$tls/{copy}"; else refused=$(cksum < "$new"); fi
  fi
  rm -f "$new" "$new.cfg"
}}
if [ -f "$tls/{files}" ]; then
  take_up
  if [ ! -f "$tls/{copy}" ]; then
    echo "HAProxy does not start: the TLS certificate and key named in $tls/{files} cannot be read or do not fit." >&2
    exit 1
  fi
  for argument in "$@"; do
    case "$argument" in
      *.cfg) sed -i -f "$tls/bind.sed" "$argument" ;;
    esac
  done
  # The newest HAProxy has the one process that looks for renewed files; it ends with the folder, too.
  echo $$ > "$tls/watched"
  ( while [ "$(cat "$tls/watched")" = $$ ] && kill -0 $$; do sleep {poll_s}; take_up; done & ) </dev/null >/dev/null 2>&1
fi
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Names and expiry of a listener's certificate."""

    names: tuple[str, ...]
    """Names and addresses that the certificate is for."""
    not_after: datetime


def script_part(folder: Path, binary: str) -> str:
    """The part of HAProxy's script for TLS, with its files in `folder`; it does nothing until files are named (`install`)."""
    tls = folder / FOLDER
    tls.mkdir(mode=0o700, exist_ok=True)
    copy = tls / COPY
    write_atomic(tls / "bind.sed", EDITS.format(copy=copy, lua=tls / "renew.lua"), mode=0o600)
    write_atomic(tls / "check.cfg", CHECK, mode=0o600)
    write_atomic(tls / "renew.lua", LUA.format(copy=copy, poll_s=POLL_S), mode=0o600)
    return SCRIPT.format(tls=tls, files=FILES, copy=COPY, binary=binary, poll_s=POLL_S)


def install(folder: Path, tls: TlsConfig | None) -> None:
    """Have the next HAProxy of the node whose files are in `folder` use TLS with these files; None: without TLS."""
    for name in (FILES, COPY):
        (folder / FOLDER / name).unlink(missing_ok=True)
    if tls is not None:
        write_atomic(folder / FOLDER / FILES, f"{tls.certificate}\n{tls.key}\n", mode=0o600)


def installed(folder: Path) -> TlsConfig | None:
    """The files of a node's listener; None: it has no TLS."""
    try:
        certificate, key = (folder / FOLDER / FILES).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return TlsConfig(certificate=certificate, key=key)


def from_settings() -> TlsConfig | None:
    """The files in TANDEM_TLS_CERTIFICATE and TANDEM_TLS_KEY; ConfigError where one is set without the other."""
    config = settings()
    if config.tls_certificate is None and config.tls_key is None:
        return None
    if config.tls_certificate is None or config.tls_key is None:
        raise ConfigError("TANDEM_TLS_CERTIFICATE and TANDEM_TLS_KEY belong together; only one of them is set.")
    return absolute(TlsConfig(certificate=str(config.tls_certificate), key=str(config.tls_key)))


def absolute(tls: TlsConfig) -> TlsConfig:
    """The same files by absolute paths."""
    return TlsConfig(
        certificate=str(Path(tls.certificate).expanduser().absolute()), key=str(Path(tls.key).expanduser().absolute())
    )


def check_files(tls: TlsConfig) -> Certificate:
    """Read a listener's files; ConfigError if they cannot be used: missing, no PEM, of two pairs, expired, or open to others."""
    # Imported here: only where TLS is used.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    chain, secret = _read("certificate", tls.certificate), _read("key", tls.key)
    _check_private(tls.key)
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise ConfigError(
            f"listen.tls.certificate: {tls.certificate} has no certificate in PEM (-----BEGIN CERTIFICATE-----)."
        ) from error
    try:
        key: Any = load_pem_private_key(secret, password=None)
    except TypeError as error:
        raise ConfigError(f"listen.tls.key: {tls.key} has a passphrase. Give a key without one, mode 0600.") from error
    except Exception as error:  # ValueError, and what cryptography raises for kinds of keys that it does not know
        raise ConfigError(f"listen.tls.key: {tls.key} has no private key in PEM that can be read.") from error
    if leaf.public_key() != key.public_key():
        raise ConfigError(
            f"listen.tls: the key in {tls.key} is not that of the first certificate in {tls.certificate}. Give the files of one "
            "pair."
        )
    now, begin, end = datetime.now(UTC), leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if end <= now:
        raise ConfigError(f"listen.tls.certificate: {tls.certificate} expired at {end:%Y-%m-%d %H:%M} UTC. Renew it.")
    if begin > now:
        raise ConfigError(
            f"listen.tls.certificate: {tls.certificate} is valid from {begin:%Y-%m-%d %H:%M} UTC on. Check this machine's clock, "
            "or give another."
        )
    return Certificate(names=_certificate_names(leaf), not_after=end)


def _read(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"listen.tls.{key}: {path} cannot be read: {error.strerror}.") from error


def _check_private(path: str) -> None:
    status = os.stat(path)
    if status.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(
            f"listen.tls.key: other users can read or change {path} (mode {stat.S_IMODE(status.st_mode):04o}). "
            f"`chmod 600 {path}`."
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"listen.tls.key: {path} belongs to another user (uid {status.st_uid}). Use a file of your own."
        )


def _certificate_names(certificate: Any) -> tuple[str, ...]:
    from cryptography import x509

    try:
        alternative_names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    addresses = [str(address) for address in alternative_names.get_values_for_type(x509.IPAddress)]
    return (*alternative_names.get_values_for_type(x509.DNSName), *addresses)


def host_of(certificate: Certificate, host: str) -> str:
    """The host for a URL of the listener: `host` if the certificate is for it, else the certificate's first name."""
    names = [name for name in certificate.names if not name.startswith("*")]
    normalized = _normalize_host(host)
    return host if not names or normalized in map(_normalize_host, names) else names[0]


def _normalize_host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()
