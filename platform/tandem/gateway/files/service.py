"""File service: stores, threads, caller checks, limits and error mapping for all routes of files."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from tandem.auth.principal import Principal, Role
from tandem.config.serving.app import GatewayConfig
from tandem.errors import (
    FileError,
    FileInUseError,
    FileQuotaError,
    RegistryError,
    RegistryUnreachableError,
    StorageError,
    UnknownFileError,
)
from tandem.files.content import ContentStore, remove_content
from tandem.files.records import Purpose
from tandem.files.uploads import UploadStore
from tandem.gateway.accounting.account import Accounting
from tandem.gateway.database import ask_database
from tandem.gateway.errors import ApiError, no_registry
from tandem.gateway.files.intake import in_thread
from tandem.gateway.files.transit import BytesInTransit
from tandem.gateway.files.upkeep import Upkeep
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.requests.held_bytes import HeldBytes

T = TypeVar("T")

STORAGE_THREADS, DATABASE_THREADS, JOIN_THREADS = 4, 4, 2
"""Threads that write and read contents, that ask the database, and that join parts. The work of all but the last is short, so few
serve many clients."""
DELETING_ROLE = Role.TRAINER
"""Role that makes and deletes files for training."""


class FileService:
    """Stores and threads of one gateway."""

    def __init__(
        self,
        store: UploadStore,
        contents: ContentStore,
        config: GatewayConfig,
        accounting: Accounting,
        held_bytes: HeldBytes,
        upkeep: Upkeep,
    ) -> None:
        self.store = store
        self.contents = contents
        self.config = config
        self.held_bytes = held_bytes
        self.upkeep = upkeep
        self.in_transit = BytesInTransit()
        self.storage_threads = ThreadPoolExecutor(STORAGE_THREADS, thread_name_prefix="file-storage")
        self.join_threads = ThreadPoolExecutor(JOIN_THREADS, thread_name_prefix="file-parts")
        self._database_threads = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="file-records")
        self._accounting = accounting

    def close(self) -> None:
        """End the threads and connections."""
        for threads in (self.storage_threads, self.join_threads, self._database_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    async def ask(self, work: Callable[..., T], *args: object, **options: object) -> T:
        """Ask the database in a thread; its errors as ApiErrors, 503 if it does not answer in time."""
        with self.api_errors():
            return await ask_database(self._database_threads, self.config.retry_after_s, work, *args, **options)

    async def store_content(self, work: Callable[..., T], *args: object, **options: object) -> T:
        """Read or write contents in a thread; errors as ApiErrors."""
        with self.api_errors():
            return await in_thread(self.storage_threads, functools.partial(work, *args, **options))

    async def remove_content(self, location: str) -> None:
        """Remove a content. Where that fails, the janitor does it later."""
        with contextlib.suppress(ApiError):
            await self.store_content(remove_content, location)

    @contextlib.contextmanager
    def api_errors(self) -> Iterator[None]:
        """Errors of files, storage and database as ApiErrors."""
        try:
            yield
        except UnknownFileError as error:
            raise ApiError(404, str(error), param=error.param) from None
        except FileInUseError as error:
            # 409 is sent again by SDKs at once; the job goes on for longer.
            raise ApiError(
                409, str(error), code="file_in_use", param=error.param, headers={"x-should-retry": "false"}
            ) from None
        except FileQuotaError as error:
            raise ApiError(403, str(error), code="file_quota_exceeded", param=error.param) from None
        except FileError as error:
            raise ApiError(400, str(error), param=error.param) from None
        except RegistryUnreachableError as error:
            raise no_registry(str(error), self.config.retry_after_s) from None
        except RegistryError as error:
            raise ApiError(400, str(error)) from None
        except StorageError as error:
            # Sent again, a large file would fill the disk again.
            raise ApiError(503, str(error), code="storage_unavailable", headers={"x-should-retry": "false"}) from None

    @contextlib.asynccontextmanager
    async def counted(self, request: Request, route: str) -> AsyncIterator[Principal]:
        """The caller of a POST, which counts as a request for limits and usage, without tokens; ApiError 429, 403."""
        principal = principal_of(request.scope)
        check_origin(request, principal, self.config.cors_origins)
        async with self._accounting.counted(principal, route):
            yield principal


def check_purpose(principal: Principal, purpose: Purpose) -> None:
    """ApiError 403 for a role that makes and deletes no files of a purpose: files for training need the role trainer."""
    needs_role = purpose in (Purpose.FINE_TUNE, Purpose.FINE_TUNE_RESULTS)
    if needs_role and principal.key_id and not principal.role.includes(DELETING_ROLE):
        raise ApiError(
            403,
            f"The key {principal.key_id} has the role {principal.role}; files of the purpose {purpose} need the role "
            f"{DELETING_ROLE}.",
            code="insufficient_permissions",
            param="purpose",
        )


def check_origin(request: Request, principal: Principal, allowed: tuple[str, ...]) -> None:
    """ApiError 403 for a web page that makes a browser send a form to an app without keys.

    Browsers send forms of any page anywhere without asking first (CORS), and name the page in `Origin`.
    """
    origin = request.headers.get("origin")
    if origin is not None and not principal.key_id and origin not in allowed:
        raise ApiError(
            403,
            "This app has no API key yet, and takes files from web pages in `gateway.cors_origins` alone. Make a key with "
            "`tandem keys create NAME`.",
            code="origin_not_allowed",
        )
