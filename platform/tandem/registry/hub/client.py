"""Client of the hub: the commit and files of a repository at a revision. Its errors, as errors with a next step.

`huggingface_hub` does the talking, with the user's settings: HF_ENDPOINT, HF_TOKEN or the token that `hf auth login` saved,
HF_HUB_OFFLINE, and proxies.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit, urlunsplit

from tandem.errors import HubError, HubUnreachableError, UnknownModelError, did_you_mean
from tandem.registry.hub.reference import COMMIT
from tandem.registry.hub.selection import RepoFile
from tandem.settings import hub_offline, variable

Kind = Literal["model", "dataset"]
ANSWER_TIMEOUT_S = 15.0
"""Seconds that the hub may take to answer about a repository."""
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
HUB = "https://huggingface.co"
MAX_SHOWN = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A repository at one commit."""

    commit: str
    files: tuple[RepoFile, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """One repository of the hub."""

    repo: str
    kind: Kind
    endpoint: str

    @classmethod
    def of(cls, repo: str, kind: Kind) -> Client:
        """A repository of the hub that the environment names."""
        return cls(repo=repo, kind=kind, endpoint=(variable("HF_ENDPOINT") or HUB).rstrip("/"))

    def listing(self, revision: str) -> Listing:
        """The commit and the files at a revision.

        HubUnreachableError if the hub does not answer, UnknownModelError for no such model, else HubError.
        """
        # Imported here: a third of a second for what most commands do not need.
        from huggingface_hub import HfApi

        with self._errors(revision):
            info: Any = HfApi(endpoint=self.endpoint).repo_info(
                self.repo, repo_type=self.kind, revision=revision, files_metadata=True, timeout=ANSWER_TIMEOUT_S
            )
            files = tuple(
                RepoFile(
                    path=file.rfilename,
                    size=file.size or 0,
                    blob=file.blob_id or "",
                    sha256=file.lfs.sha256 if file.lfs else None,
                )
                for file in info.siblings or ()
            )
        # Files are stored under these names.
        invalid_paths = [file.path for file in files if not _is_plain(file.path) or not DIGEST.fullmatch(file.key)]
        if invalid_paths or not COMMIT.fullmatch(str(info.sha)):
            raise HubError(
                f"{self.shown} lists what no hub lists: {invalid_paths[0] if invalid_paths else info.sha!r}. Check HF_ENDPOINT."
            )
        return Listing(commit=str(info.sha), files=files)

    def download(self, file: RepoFile, commit: str, target: Path, on_bytes: Callable[[int], None]) -> None:
        """Download one file, from the end of `target` on; `on_bytes` gets the count of new bytes, and may raise to stop it."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # re-exported lazily

        if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            self._download_huge(file, commit, target, on_bytes)
            return
        url = hf_hub_url(self.repo, file.path, repo_type=self.kind, revision=commit, endpoint=self.endpoint)
        with self._errors(commit), target.open("ab") as file_object:
            if file_object.tell() > file.size:
                file_object.truncate(0)
            http_get(
                url,
                cast(BinaryIO, file_object),
                resume_size=file_object.tell(),
                # A range can only be asked for of an uncompressed response.
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=cast(Any, _bar(on_bytes)),
            )

    def _download_huge(self, file: RepoFile, commit: str, target: Path, on_bytes: Callable[[int], None]) -> None:
        """By Xet, which the hub demands for files of more than 50 GB; from the beginning each time."""
        from huggingface_hub import hf_hub_download

        folder = target.with_name(f"{target.name}.xet")
        try:
            with self._errors(commit):
                path = hf_hub_download(
                    self.repo, file.path, repo_type=self.kind, revision=commit, endpoint=self.endpoint,
                    local_dir=folder, tqdm_class=cast(Any, _bar(on_bytes)),
                )  # fmt: skip
            Path(path).replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _errors(self, revision: str) -> Iterator[None]:
        from huggingface_hub import errors

        if hub_offline():
            raise HubUnreachableError("HF_HUB_OFFLINE is set")
        try:
            yield
        except errors.GatedRepoError as error:
            raise HubError(self._gated_message()) from error
        except errors.RepositoryNotFoundError as error:
            raise self._unknown_error() from error
        except errors.RevisionNotFoundError as error:
            raise HubError(f"{self._name} has no revision {revision!r}.{self._revisions(revision)}") from error
        except errors.OfflineModeIsEnabled as error:
            raise HubUnreachableError("HF_HUB_OFFLINE is set") from error
        except errors.HfHubHTTPError as error:
            raise self._refusal_error(error) from error
        except (ValueError, KeyError) as error:
            raise HubError(
                f"{self.shown} answers with what is no answer of a hub ({type(error).__name__}: {error}). Check HF_ENDPOINT."
            ) from error
        except Exception as error:  # of the HTTP client below huggingface_hub
            if not type(error).__module__.startswith(("httpx", "httpcore")):
                raise
            raise HubUnreachableError(f"{self.shown} does not answer ({type(error).__name__}: {error})") from error

    @property
    def shown(self) -> str:
        """The endpoint for messages: without a user's name and password."""
        parts = urlsplit(self.endpoint)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def _name(self) -> str:
        return f"The {self.kind} {self.repo} of the hub"

    @property
    def _page(self) -> str:
        return f"{self.shown}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    def _gated_message(self) -> str:
        from huggingface_hub import get_token

        if get_token():
            return (
                f"{self._name} is gated, and the account of your token has no access to it (403). Ask for it at "
                f"{self._page}; when it is granted, run the same command again."
            )
        return (
            f"{self._name} is gated, and there is no token (neither HF_TOKEN nor one that `hf auth login` saved). Ask for access "
            f"at {self._page}, then set HF_TOKEN or run `hf auth login`."
        )

    def _unknown_error(self) -> HubError | UnknownModelError:
        message = (
            f"The hub ({self.shown}) has no {self.kind} {self.repo}, or only for those who may see it. Check the name; for a "
            "private one set HF_TOKEN or run `hf auth login`."
        )
        return UnknownModelError(message) if self.kind == "model" else HubError(message)

    def _revisions(self, revision: str) -> str:
        from huggingface_hub import HfApi

        try:
            refs = HfApi(endpoint=self.endpoint).list_repo_refs(self.repo, repo_type=self.kind)
        except Exception:  # noqa: BLE001 - the error that is being explained matters more
            return " Name a branch, a tag or a whole commit of 40 digits."
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        listed = ", ".join(names[:MAX_SHOWN]) + (" and more" if len(names) > MAX_SHOWN else "")
        return f"{did_you_mean(revision, names)} It has {listed or 'none'}, and commits by their 40 digits."

    def _refusal_error(self, error: Any) -> HubError:
        status = error.response.status_code
        detail = str(getattr(error, "server_message", None) or error).strip().splitlines()[0]
        if status == 401:
            return HubError(
                f"The hub refuses the token (401): {detail}. Set HF_TOKEN to a valid one, or `hf auth login`."
            )
        if status == 403:
            return HubError(f"{self._name} may not be read with this token (403): {detail}. See {self._page}.")
        if status == 429 or status >= 500:
            return HubUnreachableError(f"{self.shown} answers {status}: {detail}")
        return HubError(f"{self._name} cannot be had: {self.shown} answers {status}: {detail}.")


def _is_plain(path: str) -> bool:
    parsed = PurePosixPath(path)
    return bool(parsed.parts) and not parsed.is_absolute() and ".." not in parsed.parts and "\0" not in path


def _bar(on_bytes: Callable[[int], None]) -> type:
    """A stand-in for tqdm's class that hands on how many bytes came."""

    class Bar:
        def __init__(self, *args: object, **options: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            on_bytes(int(count or 0))

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **options: None

    return Bar
