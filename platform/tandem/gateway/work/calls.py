"""Calls to the store of work from a route: in threads of their own, with its errors as ApiErrors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from tandem.auth.principal import Principal, Role
from tandem.errors import (
    ClusterError,
    ConfigError,
    FileError,
    IdempotencyConflictError,
    IllegalTransitionError,
    JobError,
    RegistryError,
    RegistryUnreachableError,
    StorageError,
    UnknownFileError,
    UnknownJobError,
    UnknownLogError,
)
from tandem.gateway.database import ask_database
from tandem.gateway.errors import ApiError, no_registry
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.requests.request_body import parse_body, read_body
from tandem.gateway.routes.conditions import idempotency_key_of
from tandem.gateway.routes.management import M, validated

T = TypeVar("T")

THREADS = 4
MAX_BODY_BYTES = 64 * 1024
UPLOAD_TIMEOUT_S = 30.0


class WorkCalls:
    """Threads and error answers of one gateway's routes for jobs."""

    def __init__(self, retry_after_s: int, name: str = "work-routes") -> None:
        """`name`: of its threads."""
        self._retry_after_s = retry_after_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=name)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, work: Callable[..., T], *args: object, **options: object) -> T:
        """Blocking work; its errors as ApiErrors, 503 if it does not end in time."""
        with self._api_errors():
            return await ask_database(self._threads, self._retry_after_s, work, *args, **options)

    @contextlib.contextmanager
    def _api_errors(self) -> Iterator[None]:
        try:
            yield
        except UnknownJobError as error:
            raise ApiError(404, str(error), code="job_not_found") from None
        except UnknownLogError as error:
            raise ApiError(404, str(error), code="log_not_found") from None
        except ClusterError as error:
            headers = {"Retry-After": str(self._retry_after_s)}
            raise ApiError(503, str(error), code="cluster_unavailable", headers=headers) from None
        except IllegalTransitionError as error:
            raise ApiError(400, str(error), code="illegal_state") from None
        except IdempotencyConflictError as error:
            raise ApiError(409, str(error), code="idempotency_conflict", headers={"x-should-retry": "false"}) from None
        except (UnknownFileError, FileError) as error:
            raise ApiError(400, str(error), code="invalid_file", param=error.param) from None
        except RegistryUnreachableError as error:
            raise no_registry(str(error), self._retry_after_s) from None
        except (JobError, ConfigError, RegistryError) as error:
            raise ApiError(400, str(error)) from None
        except StorageError as error:
            raise ApiError(503, str(error), code="storage_unavailable") from None


async def read_model(request: Request, model: type[M]) -> M:
    """The body of a request as a wire model; ApiError 400 that names the first field which does not fit."""
    return validated(model, parse_body(await read_body(request, MAX_BODY_BYTES, UPLOAD_TIMEOUT_S)))


def check_trainer(principal: Principal) -> None:
    """ApiError 403 for a key that may not train."""
    if principal.key_id and not principal.role.includes(Role.TRAINER):
        raise ApiError(
            403,
            f"The key {principal.key_id} has the role {principal.role}; changes of jobs need the role {Role.TRAINER}.",
            code="insufficient_permissions",
        )


def once_of(request: Request) -> str | None:
    """The idempotency key of a request, which counts for its caller and path; None without one."""
    key = idempotency_key_of(request)
    return None if key is None else "\0".join((principal_of(request.scope).key_id, request.url.path, key))
