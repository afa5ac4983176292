"""Bytes of uploads that are being received: they count for the quota of their tenant before the database knows of them."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from tandem.files.tenants import quota_error


class BytesInTransit:
    """Of one gateway; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        """By tenant."""

    @contextlib.contextmanager
    def upload(self, tenant: str, used_bytes: int, quota_bytes: int) -> Iterator[UploadBytes]:
        """One upload of a tenant, whose files had `used_bytes` before."""
        upload = UploadBytes(self, tenant, used_bytes, quota_bytes)
        try:
            yield upload
        finally:
            self.change(tenant, -upload.num_bytes)

    def change(self, tenant: str, num_bytes: int) -> int:
        """Add to the bytes of a tenant, or take away; what they are then."""
        with self._lock:
            self._bytes[tenant] += num_bytes
            total = self._bytes[tenant]
            if not total:
                del self._bytes[tenant]
            return total


class UploadBytes:
    """The bytes of one upload."""

    def __init__(self, all_bytes: BytesInTransit, tenant: str, used_bytes: int, quota_bytes: int) -> None:
        self.num_bytes = 0
        self._all = all_bytes
        self._tenant = tenant
        self._used_bytes = used_bytes
        self._quota_bytes = quota_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes; FileQuotaError, and they do not count, where all that the tenant has and sends would exceed its quota."""
        total = self._all.change(self._tenant, num_bytes)
        if self._used_bytes + total > self._quota_bytes:
            self._all.change(self._tenant, -num_bytes)
            raise quota_error(self._tenant, total, self._used_bytes, self._quota_bytes)
        self.num_bytes += num_bytes
