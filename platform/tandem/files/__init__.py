"""Uploaded files: content storage, database records, uploads in parts, checks of JSONL content."""

from tandem.files.content import ContentStore, ContentWriter, StoredContent
from tandem.files.janitor import Janitor
from tandem.files.records import FileRecord, FileStatus, NewFile, Purpose, UploadRecord, UploadStatus
from tandem.files.store import FileStore
from tandem.files.uploads import UploadStore

__all__ = [
    "ContentStore",
    "ContentWriter",
    "FileRecord",
    "FileStatus",
    "FileStore",
    "Janitor",
    "NewFile",
    "Purpose",
    "StoredContent",
    "UploadRecord",
    "UploadStatus",
    "UploadStore",
]
