"""Fixtures of the integration tests."""

from __future__ import annotations

from serve_fixtures import pooled as pooled
from serve_fixtures import serve_port as serve_port
from serve_fixtures import served as served
