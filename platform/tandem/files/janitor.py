"""Removal of contents that no client can reach any more: of deleted and expired files, of ended uploads, of broken transfers.

Several gateways may do this at once. What fails is tried again by the next round.
"""

from __future__ import annotations

import itertools
import logging

from tandem.errors import TandemError
from tandem.files.content import ContentStore, remove_content
from tandem.files.uploads import UploadStore
from tandem.storage import base_name

STAGING_AGE_S = 2 * 3600.0
"""Seconds after its last byte when a transfer counts as broken: its client would have been refused before."""
UNRECORDED_AGE_S = 86_400.0
"""Seconds after which a content without a record is removed; its writer has died between storing and recording it."""
LOCATIONS_AT_ONCE = 500

log = logging.getLogger(__name__)


class Janitor:
    """Removes contents of one store."""

    def __init__(self, store: UploadStore, contents: ContentStore) -> None:
        self._store = store
        self._contents = contents

    def remove_ended(self) -> None:
        """End what has expired, and remove the contents of deleted files and ended uploads."""
        self._store.expire()
        self._store.expire_uploads()
        for file_id, location in self._store.deleted_contents():
            if _removed(location):
                self._store.content_removed(file_id)
        for part in self._store.ended_parts():
            if _removed(part.location):
                self._store.forget_part(part.id)
        self._store.forget_deleted()

    def remove_unrecorded(self) -> None:
        """Remove broken transfers, and contents that have no record. Lists the whole store."""
        for location, published in self._contents.stale(STAGING_AGE_S):
            if not published:
                _removed(location)
        old = (location for location, published in self._contents.stale(UNRECORDED_AGE_S) if published)
        while locations := list(itertools.islice(old, LOCATIONS_AT_ONCE)):
            # By their ids: stores write the same location in several ways.
            of_id = {base_name(location): location for location in locations}
            for content_id in self._store.without_record(of_id):
                log.warning("%s has no record; it is removed.", of_id[content_id])
                _removed(of_id[content_id])


def _removed(location: str) -> bool:
    try:
        remove_content(location)
    except TandemError as error:
        log.warning("%s could not be removed: %s It is tried again.", location, error)
        return False
    return True
