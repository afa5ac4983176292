#!/usr/bin/env python3
"""Health check of the container: whether the gateway answers. The status is 0 if it does, else 1."""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0


def main() -> int:
    """The status of the process."""
    scheme = "https" if os.environ.get("TANDEM_TLS_CERTIFICATE") else "http"
    url = f"{scheme}://127.0.0.1:{os.environ.get('TANDEM_PORT') or 8000}/health/ready"
    # The certificate is for the name that clients use, not for loopback.
    context = ssl.create_default_context() if scheme == "https" else None
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context) as answer:
            return int(answer.status != 200)
    except (OSError, urllib.error.URLError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
